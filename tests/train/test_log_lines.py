import pytest

from stratagem.train import Progress
from stratagem.train.hooks.log_format import bar_label, evaluation_line, train_line, train_place

EPOCHS = Progress(epoch=1, iter=174, batch=49, max_epochs=12, max_iters=1500, epoch_length=125)
ITERATIONS = Progress(iter=9, batch=9, max_iters=1000, epoch_length=125)


def test_the_position_in_an_epoch_is_counted_from_one_and_aligned():
    """The 50th of 125 batches in the second of twelve epochs is shown as a 1-based, aligned position."""
    assert train_place(EPOCHS) == "Epoch(train) [ 2][ 50/125]"


def test_the_position_in_a_run_of_iterations():
    """The tenth of a thousand iterations is shown."""
    assert train_place(ITERATIONS) == "Iter(train) [  10/1000]"


def test_the_position_in_a_stream():
    """An unknown epoch length is shown as a question mark."""
    assert train_place(Progress(batch=4, max_epochs=3)) == "Epoch(train) [1][5/?]"


def test_the_label_of_the_progress_bar_is_short():
    """The bar counts iterations itself and must leave room for loss, rate, speed, and time left in 80 columns."""
    assert (bar_label(EPOCHS), bar_label(ITERATIONS)) == ("epoch 2/12", "train")


def test_a_training_line_has_the_familiar_format():
    """Parts are separated by two spaces; rates have four digits and an exponent, other numbers four decimals."""
    line = train_line(
        "Epoch(train) [1][2/4]",
        {"loss": 0.00094, "loss_box": 1.5},
        {"lr": 0.01},
        seconds=(0.01941, 0.0046),
        left_s=3723.9,
    )
    assert line == (
        "Epoch(train) [1][2/4]  lr: 1.0000e-02  eta: 1:02:03  time: 0.0194  data_time: 0.0046  "
        "loss: 0.0009  loss_box: 1.5000"
    )


def test_a_line_on_an_accelerator_has_its_memory():
    """The memory comes between the times and the losses; unknown values are omitted."""
    line = train_line("here", {"loss": 1.0}, {}, seconds=None, left_s=None, memory={"memory": 812})
    assert line == "here  memory: 812  loss: 1.0000"


def test_a_line_has_what_was_done_per_second_and_the_peak_of_the_host_memory():
    """Rates come before the memory; rates below 100 have two decimals, and the current host memory is only recorded."""
    speed = {"samples_per_second": 5120.4, "steps_per_second": 40.0}
    memory = {"host_memory": 700, "host_memory_peak": 812, "host_memory_used": 0.5}
    line = train_line("here", {"loss": 1.0}, {}, seconds=None, left_s=None, speed=speed, memory=memory)
    assert line == "here  samples/s: 5120  steps/s: 40.00  host_memory_peak: 812  loss: 1.0000"


@pytest.mark.parametrize(
    ("mode", "progress", "batches", "place"),
    [
        ("val", Progress(epoch=2, max_epochs=5), 8, "Epoch(val) [2][8/8]"),
        ("val", ITERATIONS, 8, "Iter(val) [9][8/8]"),
        ("val", Progress(), 8, "Epoch(val) [0][8/8]"),
        ("val", EPOCHS, None, "Epoch(val) [1]"),
        ("test", EPOCHS, 4, "Epoch(test) [4/4]"),
        ("test", Progress(), 4, "Epoch(test) [4/4]"),
    ],
)
def test_an_evaluation_line(mode: str, progress: Progress, batches: int | None, place: str):
    """Four spaces follow the position; numbers have four decimals, and other values are printed as they are."""
    line = evaluation_line(mode, progress, batches, {"accuracy": 0.98104, "classes": [1, 2]})
    assert line == f"{place}    accuracy: 0.9810  classes: [1, 2]"
