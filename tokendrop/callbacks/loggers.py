"""What callbacks hand to a trainer's loggers beside numbers, and who else reads the numbers.

Shape letters: none.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import MLFlowLogger

from tokendrop.errors import NoEffectWarning, UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_figure(trainer: L.Trainer, name: str, draw: Callable[[], "Figure"]) -> None:
    """Give a figure to each logger that takes one, on rank zero; it is drawn only where there is one.

    Loggers are asked for what they have, not for their class: `log_image` of the logger (W&B), `add_figure` of its
    experiment (TensorBoard), or `log_figure` of it beside a `run_id` (MLflow). The others, such as CSV, get none.

    Args:
        trainer: whose loggers these are.
        name: of the figure; it is kept for each optimiser step.
        draw: makes it.
    """
    if not trainer.is_global_zero:
        return
    takers = [give for give in map(_taker, trainer.loggers) if give is not None]
    if not takers:
        return
    figure = draw()
    for give in takers:
        give(name, figure, trainer.global_step)


def warn_of_unknown(trainer: L.Trainer, prefix: str) -> None:
    """Say that an EarlyStopping on a figure of ours ends training, without a word of its own, where it is unknown."""
    for one in trainer.callbacks:  # ty: ignore
        if isinstance(one, EarlyStopping) and one.check_finite and (one.monitor or "").startswith(prefix):
            warnings.warn(
                f"EarlyStopping(monitor={one.monitor!r}) ends training at the first event where this figure is "
                "unknown, which is logged as NaN; give it check_finite=False",
                NoEffectWarning,
                stacklevel=2,
            )


def check_loggers(trainer: L.Trainer, name: str) -> None:
    """Refuse a logger that cannot hold both a figure and the ends of its interval.

    Raises:
        UnsupportedError: MLflow's store of files, in which one would be a file and a folder.
    """
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger) and logger.save_dir is not None:
            raise UnsupportedError(
                f"MLflow's store of files in {logger.save_dir!r} cannot hold {name!r} beside '{name}/low'; use its "
                "database, such as tracking_uri='sqlite:///mlflow.db'"
            )


def _taker(logger: Any) -> Callable[[str, "Figure", int], None] | None:
    if callable(getattr(logger, "log_image", None)):
        return lambda name, figure, step: logger.log_image(name, [_pixels(figure)], step)
    experiment: Any = logger.experiment
    if callable(getattr(experiment, "add_figure", None)):
        return lambda name, figure, step: experiment.add_figure(name, figure, step)
    if callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):
        return lambda name, figure, step: experiment.log_figure(logger.run_id, figure, f"{name}/{step:08d}.png")
    return None


def _pixels(figure: "Figure") -> Any:
    """(height, width, 4) uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())
