"""A small generative adversarial network, and a hook that saves generated images."""

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from stratagem.model import BaseModel
from stratagem.optim import OptimWrapperDict
from stratagem.registry import HOOKS, MODELS
from stratagem.train import Hook, Run


@MODELS.register_module()
class DigitGAN(BaseModel):
    """A DCGAN (arXiv:1511.06434) that is small enough for a CPU.

    The generator maps noise of shape [N, noise] to images of shape [N, 1, 28, 28].
    """

    def __init__(self, *, noise: int = 64, width: int = 32) -> None:
        super().__init__()
        self.noise = noise
        self.generator = nn.Sequential(
            nn.Linear(noise, 4 * width * 7 * 7, bias=False),
            nn.BatchNorm1d(4 * width * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (4 * width, 7, 7)),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 1, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * 7 * 7, 1),
        )

    def train_step(self, data: object, optim_wrapper: OptimWrapperDict) -> dict[str, Tensor]:
        """Update the generator, then the discriminator."""
        images, _ = self.data_preprocessor(data, True)
        generate, discriminate = optim_wrapper["generator"], optim_wrapper["discriminator"]

        with generate.optim_context(self.generator):
            fake = self.generator(torch.randn(len(images), self.noise, device=images.device))
            generator_loss = binary_cross_entropy_with_logits(self.discriminator(fake), torch.ones(len(images), 1))
        generate.update_params(generator_loss)
        discriminate.zero_grad()  # discard the gradients from the generator's backward pass

        with discriminate.optim_context(self.discriminator):
            scores = self.discriminator(torch.cat([images, fake.detach()]))
            # One-sided label smoothing: the target of real images is 0.9.
            labels = torch.cat([torch.full((len(images), 1), 0.9), torch.zeros(len(images), 1)])
            discriminator_loss = binary_cross_entropy_with_logits(scores, labels)
        discriminate.update_params(discriminator_loss)
        return {"generator_loss": generator_loss.detach(), "discriminator_loss": discriminator_loss.detach()}

    def forward(self, noise: Tensor, mode: str = "tensor") -> Tensor:
        """Return the images generated from ``noise``."""
        return self.generator(noise)


@HOOKS.register_module()
class PictureHook(Hook):
    """After every epoch, generate 64 images from the same noise and save them as ``<work_dir>/epoch_<n>.png``."""

    def before_train(self, run: Run) -> None:
        model = run.strategy.unwrap_model()
        self.noise = torch.randn(64, model.noise, generator=torch.Generator().manual_seed(0))

    def after_train_epoch(self, run: Run) -> None:
        if run.rank != 0:
            return
        model = run.strategy.unwrap_model()
        model.eval()
        # Use the averaged weights if a hook such as EMAHook keeps them.
        with torch.no_grad(), run.evaluating():
            images = model(self.noise.to(run.world.device)).cpu()
        model.train()
        rows = images.reshape(8, 8, 28, 28).permute(0, 2, 1, 3).reshape(8 * 28, 8 * 28)
        write_png(Path(run.work_dir) / f"epoch_{run.epoch + 1}.png", rows)


def write_png(path: Path, gray: Tensor) -> None:
    """Write an image of shape [height, width] with values from 0 to 1 as an 8-bit PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = (gray * 255).round().to(torch.uint8)
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    lines = b"".join(b"\0" + bytes(line.tolist()) for line in pixels)  # filter type 0: none
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
