"""The plan in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from torch import Tensor, nn

from dq_plugins.artifact import STRICT, Format
from dq_plugins.artifact.codec import encode
from dq_plugins.errors import PlanError, close_matches
from dq_plugins.hashing import hash_json, hash_tensors, weights_hash
from dq_plugins.plan.attention import AttentionPlan
from dq_plugins.plan.decisions import (
    BinaryTraining,
    CalibrationCalls,
    MeasuredSensitivity,
    OutlierRows,
    RangeMethods,
    SamplerCorrection,
    TabulatedBlock,
    Targets,
)
from dq_plugins.plan.fitting import misfit, rows_misfit
from dq_plugins.plan.layers import FEATURE, ActivationQuant, LayerPlan
from dq_plugins.plan.overview import overview, overview_html
from dq_plugins.plan.section import Section
from dq_plugins.timesteps import RowOrder, Schedule, TimestepGroups


@dataclass(frozen=True)
class PassRecord:
    """A pass that contributed to a plan.

    Attributes:
        name: of the pass.
        options: that it ran with.
        provider: where the pass comes from, with version and hash; None: it comes with dq-plugins.
    """

    __pydantic_config__ = STRICT

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    provider: str | None = None


@dataclass
class QuantPlan:
    """Every decision about one denoiser.

    Attributes:
        model: class name of the denoiser the plan was made for.
        model_hash: `weights_hash` of its full-precision weights.
        timestep_argument: name of the forward argument that carries the timestep.
        schedule: timesteps of the sampling run that was recorded, in order.
        sampling: timesteps that sampling with this plan visits, descending; None: the sampler's own.
        groups: named sets of timestep groups.
        layers: one entry for every quantizable layer, by fully qualified name.
        attention: one entry for every attention that a pass has looked at, by the name of the module that attends.
        shared_rows: by name of the groups, the range that each of them uses: groups of one number share theirs. Groups
            that are not named have a range each.
        calibration_calls: the recorded calls that passes calibrate on from now on; None: all.
        sensitivity: what widths cost.
        learned_layers: layers whose rounding is settled: later passes that learn rounding leave them as they are.
        learned_ranges: layers whose input ranges are learned: ``activation-ranges`` leaves them as they are.
        temporal_table: what the temporal block gives at every timestep, to be looked up.
        outlier_rows: exact output rows for outlier tokens, by layer.
        binary_training: how binary weights train.
        sampler_correction: what the sampler does about the denoiser's errors; the denoiser does not know of it.
        sections: what passes added beyond that, by pass name.
        passes: the passes that wrote the plan, in order.
        recipe: name of the recipe.
        seed: seed of every random choice.
        targets: what the run aimed at.
        range_methods: how ranges were chosen.
        tracer: how the graph behind roles, blocks and dependencies was found, see `dq_plugins.graph.trace`.
    """

    __pydantic_config__ = STRICT

    model: str
    model_hash: str
    timestep_argument: str
    schedule: Schedule
    groups: dict[str, TimestepGroups] = field(default_factory=dict)
    layers: dict[str, LayerPlan] = field(default_factory=dict)
    sections: dict[str, Section] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    recipe: str = ""
    seed: int = 0
    targets: Targets = field(default_factory=Targets)
    range_methods: RangeMethods = field(default_factory=RangeMethods)
    sampling: Schedule | None = None
    shared_rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    calibration_calls: CalibrationCalls | None = None
    sensitivity: MeasuredSensitivity | None = None
    learned_layers: frozenset[str] = frozenset()
    learned_ranges: frozenset[str] = frozenset()
    temporal_table: TabulatedBlock | None = field(default=None, metadata=FEATURE)
    outlier_rows: dict[str, OutlierRows] = field(default_factory=dict, metadata=FEATURE)
    binary_training: BinaryTraining | None = None
    sampler_correction: SamplerCorrection | None = None
    attention: dict[str, AttentionPlan] = field(default_factory=dict)
    tracer: str = ""

    @property
    def row_orders(self) -> dict[str, RowOrder | None]:
        """Where the samples of a call are in the input of each layer."""
        return {name: layer.rows for name, layer in self.layers.items()}

    def layer(self, name: str) -> LayerPlan:
        """Entry of one layer; an unknown name raises `PlanError` with close matches."""
        if name not in self.layers:
            raise PlanError(f"the plan has no layer {name!r}{close_matches(name, self.layers)}")
        return self.layers[name]

    def validate(self) -> QuantPlan:
        """Check the plan against itself.

        Raises:
            PlanError: a table of a layer names unknown groups or has another length than they have, a layer is left
                in full precision without a reason, or the sampling timesteps do not descend inside the groups.
        """
        for name, layer in self.layers.items():
            whose = f"layer {name!r}"
            if (layer.weight is None or layer.activation is None) and layer.unquantized_reason is None:
                raise PlanError(f"{whose} is (partly) in full precision and the plan does not say why")
            if isinstance(layer.activation, ActivationQuant):
                self._check_table(whose, layer.activation.groups, len(layer.activation.scale), "activation scales")
            elif layer.activation is not None and layer.activation.groups is not None:
                self._check_table(whose, layer.activation.groups, len(layer.activation.widths), "activation widths")
            if layer.bias_correction is not None and layer.bias_correction.groups is not None:
                table = layer.bias_correction
                self._check_table(whose, table.groups, len(table.values), "rows of bias correction")
        for name, attention in self.attention.items():
            for operand, quant in attention.quantizers.items():
                self._check_table(f"the {operand} of attention {name!r}", quant.groups, len(quant.scale), "scales")
        self._check_names()
        self._check_sampling()
        return self

    def _check_names(self) -> None:
        """Everything that names layers or groups names those that the plan has."""
        named = {
            "learned_layers": self.learned_layers,
            "learned_ranges": self.learned_ranges,
            "outlier_rows": self.outlier_rows,
            "temporal_table": self.tabulated,
        }
        for what, names in named.items():
            for name in names:
                if name not in self.layers:
                    raise PlanError(f"{what} names layer {name!r}, which the plan does not have")
        for name, rows in self.shared_rows.items():
            self._check_table("shared_rows", name, len(rows), "rows")
            if min(rows) < 0 or sorted(set(rows)) != list(range(max(rows) + 1)):
                raise PlanError(f"shared_rows of {name!r} are numbered from 0 without gaps, got {rows}")

    def _check_table(self, whose: str, groups: str, found: int, what: str) -> None:
        if groups not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise PlanError(f"{whose} uses timestep groups {groups!r}; the plan has: {known}")
        expected = len(self.groups[groups])
        if found != expected:
            raise PlanError(f"{whose} has {found} {what}, but timestep groups {groups!r} are {expected}")

    @property
    def visited(self) -> Schedule:
        """Timesteps that sampling visits: those that the plan chose, or the recorded ones."""
        return self.schedule if self.sampling is None else self.sampling

    @property
    def tabulated(self) -> frozenset[str]:
        """Layers that the temporal table replaces."""
        return frozenset() if self.temporal_table is None else self.temporal_table.layers

    def _check_sampling(self) -> None:
        if self.sampling is None:
            return
        chosen = self.sampling.timesteps
        if any(a <= b for a, b in pairwise(chosen)):
            raise PlanError(f"sampling visits descending timesteps, each once; the plan has {chosen}")
        for name, groups in self.groups.items():
            if not (groups.low <= chosen[-1] and chosen[0] <= groups.high):
                raise PlanError(
                    f"sampling visits {chosen[0]:g} to {chosen[-1]:g}, but timestep groups {name!r} were calibrated "
                    f"from {groups.low:g} to {groups.high:g}"
                )

    def check_model(self, denoiser: nn.Module) -> None:
        """Raise `PlanError` unless the plan was made for these weights and its layers exist."""
        modules = dict(denoiser.named_modules())
        unknown = [name for name in (*self.layers, *self.attention) if name not in modules]
        if unknown:
            raise PlanError(
                f"the plan names layer {unknown[0]!r} ({len(unknown)} such), which this {type(denoiser).__name__} "
                f"does not have: it was made for another model ({self.model})"
            )
        self.check_shapes(denoiser)
        found = weights_hash(denoiser)
        if found != self.model_hash:
            raise PlanError(
                f"the plan was made for other weights of {self.model}: it holds hash {self.model_hash[:12]}, this "
                f"{type(denoiser).__name__} has {found[:12]}. Make a plan for these weights, or load the original ones."
            )

    def check_shapes(self, denoiser: nn.Module) -> None:
        """Raise `PlanError` unless what is stored for the channels of a layer fits that layer."""
        modules = dict(denoiser.named_modules())
        for name, layer in self.layers.items():
            if fault := misfit(layer, modules[name]):
                raise PlanError(f"layer {name!r} {fault}: the plan is damaged, or of another {self.model}")
        for name, rows in self.outlier_rows.items():
            if fault := rows_misfit(rows, modules[name]):
                raise PlanError(f"layer {name!r} {fault}: the plan is damaged, or of another {self.model}")

    @property
    def features(self) -> dict[str, tuple[str, ...]]:
        """What an adapter has to implement beyond the quantizers of layers, and for which layers, if for single ones.

        These are the fields with ``metadata=FEATURE`` of the plan and of its layers that are set, the critical
        sections, and quantized attention.
        """
        found: dict[str, list[str]] = {name: [] for name, section in self.sections.items() if section.critical}
        found |= {f.name: [] for f in fields(self) if f.metadata == FEATURE and getattr(self, f.name)}
        for name, layer in self.layers.items():
            for feature in layer.features:
                found.setdefault(feature, []).append(name)
        if attending := [name for name, attention in self.attention.items() if attention.quantized]:
            found["attention"] = attending
        return {feature: tuple(layers) for feature, layers in sorted(found.items())}

    def refuse_unimplemented(self, implemented: Collection[str], adapter: str) -> None:
        """Raise `PlanError` if the plan depends on something that is not among the features ``adapter`` implements."""
        missing = {feature: layers for feature, layers in self.features.items() if feature not in implemented}
        if missing:
            named = [f"{feature} (layer {layers[0]!r})" if layers else feature for feature, layers in missing.items()]
            raise PlanError(
                f"adapter {adapter!r} does not implement {', '.join(named)}, which this plan depends on; use another "
                "backend, or leave the pass that wrote it out of the recipe"
            )

    @property
    def hash(self) -> str:
        """sha256 over everything the plan holds, tensors included."""
        tensors: dict[str, Tensor] = {}
        return hash_json([encode(self, "", tensors), hash_tensors(tensors)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QuantPlan) and self.hash == other.hash

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        return overview(self)

    def _repr_html_(self) -> str:
        return overview_html(self)

    def save(self, folder: str | Path, settings: Mapping[str, Any] | None = None) -> Path:
        """Write ``plan.json``, sorted and diffable, and the tensors beside it; an old plan is replaced in one step.

        Args:
            folder: made if it does not exist.
            settings: what the plan depends on, see `dq_plugins.artifact.Format.find`.

        Returns:
            The folder.

        Raises:
            PlanError: the plan contradicts itself.
        """
        return PLAN.write(Path(folder) / PLAN_NAME, self.validate(), settings).parent

    @staticmethod
    def load(folder: str | Path) -> QuantPlan:
        """Read and validate a plan.

        Raises:
            PlanError: files missing, damaged, altered, of another format, or contradicting each other.
        """
        return PLAN.read(Path(folder) / PLAN_NAME)


PLAN_NAME = "plan.json"
PLAN: Format[QuantPlan] = Format(
    "plan",
    4,
    Annotated[QuantPlan, AfterValidator(QuantPlan.validate)],
    PlanError,
    "a plan",
    "Make the plan again.",
    accept="dq-plugins sign",
)
"""Plans in memory and on disk, for those who carry them in files of their own."""
