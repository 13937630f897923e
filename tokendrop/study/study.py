"""The nine runs of the study: one model and its data under nine choices of tasks, methods and updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tokendrop.callbacks import TokenDrop
from tokendrop.methods import HiMix, HMGen, SkipVision
from tokendrop.roles import Method, Separate
from tokendrop.schedule import Schedule
from tokendrop.unified.data import TASKS, Question, Scenes
from tokendrop.unified.datamodule import UnifiedData, Update
from tokendrop.unified.images import Source
from tokendrop.unified.model import UnifiedVLM

Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Run:
    """Which tasks are trained, and the method of each; a task without one is dense.

    Args:
        tasks: one or both.
        methods: task -> method.
        updates: training batches over those of the study.
    """

    tasks: tuple[str, ...]
    methods: Mapping[str, Method]
    updates: float = field(default=1.0, kw_only=True)


@dataclass(frozen=True)
class Study:
    """The size of everything: all runs of a study share it.

    Args:
        source: "digits" or "mnist".
        grid: rows and columns of digits in an image.
        codes: size of the codebook.
        few: training images of understanding, so that generation brings what it lacks; 0 for all, in both tasks.
        question: what understanding is asked.
        hidden: width of the decoder.
        layers: depth of the decoder.
        heads: attention heads.
        shallow: the layers that HMGen's image tokens skip.
        steps: training batches of each task.
        batch_size: samples in a batch.
        update: "alternating" or "mixed".
        learning_rate: its peak.
        val_scenes: validation scenes of each task, seen `curve_points` times.
        test_scenes: test scenes of each task.
        curve_points: points of a learning curve.
        timing_rounds: timed steps of each configuration and task.
        accelerator: of Lightning's trainer.
        precision: likewise.

    Example:
        >>> list(Study().runs())
        ['U-only', 'G-only', 'unified', 'unified x0.6', 'HiMix-U', 'HMGen-G', 'share-all', 'share-partial', 'ours']
    """

    source: Source = "digits"
    grid: tuple[int, int] = (1, 2)
    codes: int = 64
    few: int = 300
    question: Question = "caption"
    hidden: int = 64
    layers: int = 6
    heads: int = 4
    shallow: str = "1:5:2"
    steps: int = 400
    batch_size: int = 32
    update: Update = "alternating"
    learning_rate: float = 3e-3
    val_scenes: int = 128
    test_scenes: int = 512
    curve_points: int = 8
    timing_rounds: int = 25
    accelerator: str = "cpu"
    precision: Precision = "32-true"

    def runs(self) -> dict[str, Run]:
        """The nine runs by name."""
        understanding, generation = TASKS

        def both(first: Method, separate: Separate) -> dict[str, Method]:
            return {understanding: first, generation: HMGen(self.shallow, separate)}

        return {
            "U-only": Run((understanding,), {}, updates=2),  # where it is best on validation
            "G-only": Run((generation,), {}),
            "unified": Run(TASKS, {}),
            "unified x0.6": Run(TASKS, {}, updates=0.6),
            "HiMix-U": Run((understanding,), {understanding: HiMix()}, updates=2),
            "HMGen-G": Run((generation,), {generation: HMGen(self.shallow, "shared")}),
            "share-all": Run(TASKS, both(HiMix(), "none")),
            "share-partial": Run(TASKS, both(HiMix(separate="per-task"), "per-task")),
            # Image tokens of both tasks are whole in the first layer; 0.6 of the FLOPs of `unified`.
            "ours": Run(TASKS, {understanding: HiMix("1:"), generation: SkipVision("1:", keep=0)}, updates=1.13),
        }

    def batches(self, run: Run) -> int:
        """Training batches of each task of a run."""
        return max(1, round(run.updates * self.steps))

    @property
    def scenes(self) -> Scenes:
        """What the data are made of."""
        return Scenes(self.source, self.grid, self.codes, self.few, self.question)

    def data(self, run: Run, seed: int) -> UnifiedData:
        """The batches of a run."""
        return UnifiedData(
            self.scenes,
            run.tasks,
            steps=self.batches(run),
            batch_size=self.batch_size,
            update=self.update,
            seed=seed,
            val_scenes=self.val_scenes,
            test_scenes=self.test_scenes,
        )

    def model(self, seed: int) -> UnifiedVLM:
        """The untrained model, the same for every run of a seed."""
        return UnifiedVLM(self.scenes, self.hidden, self.layers, self.heads, self.learning_rate, seed)

    def schedule(self, name: str) -> Schedule | None:
        """When a run's dropping sets in; None for at once."""
        return None

    def callback(self, name: str) -> TokenDrop | None:
        """What drops a run's tokens; None for a dense run."""
        run = self.runs()[name]
        return TokenDrop(dict(run.methods), schedule=self.schedule(name)) if run.methods else None


DEMO = Study(question="digit")
QUICK = replace(DEMO, steps=50, val_scenes=64, test_scenes=64, curve_points=4, timing_rounds=7)
