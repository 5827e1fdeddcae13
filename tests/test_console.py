"""What a run prints."""

from kd_trainer.console import console_line


def test_training_line_shows_terms_rate_and_units():
    """A run that is watched in a terminal shows which term is large."""
    logs = {"loss": 1.5, "kl": 0.1, "mse": 0.2, "bce": 0.3, "dice": 0.4}
    line = console_line(logs | {"learning_rate": 1e-4, "free_units": 3.0, "temperature": 2.5})
    assert line == (
        "loss 1.500 (kl 0.100 mse 0.200 bce 0.300 dice 0.400) lr 1.0e-04 free units 3 T 2.50"
    )


def test_training_line_without_a_teacher_has_no_temperature():
    """A temperature that nothing uses suggests a teacher."""
    line = console_line({"loss": 1.0, "bce": 0.5, "dice": 0.5, "temperature": 4.0})
    assert line is not None
    assert "T " not in line
    assert "kl" not in line


def test_evaluation_line_shows_the_main_figures():
    """Thirty values in one line hide the one that matters."""
    logs = {"eval_miou": 0.5, "eval_dice": 0.6, "eval_agreement": 0.7, "eval_loss": 1.0}
    line = console_line(logs | {"epoch": 2.0, "eval_precision": 0.1})
    assert line == "epoch  2.00  mIoU 0.5000  Dice 0.6000  agreement 0.7000  loss 1.0000"


def test_other_logs_print_nothing():
    """The Trainer logs its speed at the end, which the summary has."""
    assert console_line({"train_runtime": 3.0}) is None
    assert console_line({}) is None
