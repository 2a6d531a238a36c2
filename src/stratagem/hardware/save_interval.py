"""How often a run should save a checkpoint, from the time that a save takes and the rate of failures.

J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9), 1974.
J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems
22(3), 2006, equation 37.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, final

from stratagem.errors import ConfigValueError

__all__ = ["MTBF_OF_A_DEVICE", "SaveInterval", "save_interval"]

# 419 unexpected interruptions of 16,384 GPUs in 54 days: "The Llama 3 Herd of Models", 2024, section 3.3.4. That is one in 50,700
# hours of a GPU; rounded.
MTBF_OF_A_DEVICE: Final = 50_000 * 3600.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SaveInterval:
    """The best interval between saves.

    Attributes:
        save: the seconds for which a save stops the training.
        mtbf: the mean seconds between failures of the whole job.
        young: seconds of training between saves by Young's formula.
        daly: seconds of training between saves by Daly's formula.
        lost: the expected part of the time that is lost with Daly's interval: saves, and training since the last save that a
            failure discards. Restarts are not included.
    """

    save: float
    mtbf: float
    young: float
    daly: float
    lost: float


def save_interval(*, save: float, devices: int, mtbf_of_a_device: float = MTBF_OF_A_DEVICE) -> SaveInterval:
    """Return the interval between saves that loses the least time.

    Args:
        save: the seconds for which a save stops the training.
        devices: the number of devices; the failure of one stops the job.
        mtbf_of_a_device: the mean seconds between failures of one device.

    Raises:
        ConfigValueError: if a value is not positive.
    """
    if min(save, devices, mtbf_of_a_device) <= 0:
        raise ConfigValueError(
            f"The time of a save ({save} s), the number of devices ({devices}) and the mean time between failures "
            f"({mtbf_of_a_device} s) must be positive."
        )
    mtbf = mtbf_of_a_device / devices
    ratio = save / (2 * mtbf)
    young = math.sqrt(2 * save * mtbf)
    daly = mtbf if ratio >= 1 else young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save
    period = daly + save
    # A failure discards half a period on average.
    lost = min(1.0, save / period + period / (2 * mtbf))
    return SaveInterval(save=save, mtbf=mtbf, young=young, daly=daly, lost=lost)
