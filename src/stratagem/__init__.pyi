from stratagem._version import __version__ as __version__
from stratagem.config import Config as Config
from stratagem.config import ConfigDict as ConfigDict
from stratagem.model import BaseModel as BaseModel
from stratagem.runner import Runner as Runner
from stratagem.strategies import BaseStrategy as BaseStrategy
from stratagem.strategies import DDPStrategy as DDPStrategy
from stratagem.strategies import SingleDeviceStrategy as SingleDeviceStrategy
