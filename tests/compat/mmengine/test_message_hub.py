"""Scalars on accelerators wait in the message hub until somebody reads them."""

from __future__ import annotations

import torch

from stratagem.compat.mmengine.logging import MessageHub


def test_pending_values_keep_their_order_and_counts() -> None:
    """Values that wait are appended before a later number, and the mean weighs them by their counts."""
    hub = MessageHub.get_instance("pending-order")
    # The CPU cannot defer reading, so this adds what update_scalar() adds for values on an accelerator.
    hub._add_pending("train/loss", torch.tensor(6.0), 2)
    hub._add_pending("train/loss", torch.tensor([3.0]), 1)
    hub.update_scalar("train/loss", 1.0)
    assert hub.get_scalar("train/loss").data[0].tolist() == [6.0, 3.0, 1.0]
    assert hub.get_scalar("train/loss").mean() == 10 / 4


def test_pending_values_are_those_of_the_time_when_they_were_added() -> None:
    """A compiled model may write its next loss to the same memory."""
    hub, loss = MessageHub.get_instance("pending-copy"), torch.tensor(2.0)
    hub._add_pending("train/loss", loss, 1)
    loss.fill_(7.0)
    assert hub.log_scalars["train/loss"].current() == 2.0


def test_checkpoints_contain_pending_values() -> None:
    """The state of a hub is complete, although nobody has read the histories before."""
    hub = MessageHub.get_instance("pending-state")
    hub.update_scalar("train/loss", 3.0)
    hub._add_pending("train/loss", torch.tensor(2.0), 1)
    assert hub.state_dict()["log_scalars"]["train/loss"].data[0].tolist() == [3.0, 2.0]
