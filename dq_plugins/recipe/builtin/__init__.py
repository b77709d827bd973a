"""Built-in recipes, registered by name through the package's entry points."""

from dq_plugins.recipe import Recipe, Step

FAST = Recipe(
    "fast",
    "min-max ranges in uniform timestep groups: seconds, and good at 8 bits",
    (
        Step("weight-ranges", {"method": "minmax"}),
        Step("timestep-groups", {"method": "uniform"}),
        Step("activation-ranges", {"observer": "minmax"}),
    ),
)

RANGES = Recipe(
    "ranges",
    "error-minimising ranges in optimal timestep groups, from statistics of inputs alone",
    (
        Step("weight-ranges"),
        Step("timestep-groups"),
        Step("activation-ranges"),
    ),
)

DEFAULT = Recipe(
    "default",
    "balanced inputs, compensating rounding, and no error that every step repeats: what most people should use",
    (
        Step("channel-balance"),
        Step("weight-ranges", {"embedding_bits": 8, "method": "later"}),
        Step("gptq"),
        Step("timestep-groups"),
        Step("activation-ranges", {"observer": "by-width"}),
        Step("bias-correction"),
        Step("exempt-layers", {"optional": True, "runs": 1, "images": 1}),
    ),
)

BEST = Recipe(
    "best",
    "default, with ranges per token where they win; then blocks and the whole denoiser learned against recorded "
    "outputs: minutes to hours, the best images",
    (
        Step("channel-balance"),
        Step("weight-ranges", {"embedding_bits": 8, "method": "later"}),
        Step("gptq"),
        Step("timestep-groups"),
        Step("activation-ranges", {"observer": "by-width", "ranges": "measured"}),
        Step("block-reconstruction", {"iterations": 100, "most_bits": 6, "samples": 80}),
        Step("bias-correction"),
        Step("learned-ranges", {"learn": ("ranges", "scales", "corrections"), "passes": 1.5, "images": 2, "looks": 4}),
        Step("exempt-layers", {"optional": True, "runs": 1}),
    ),
)

LOW_BIT = Recipe(
    "low-bit",
    "best for 4 bits and below: rotated inputs, a low-rank branch, weight scales in groups of 32 inputs; torchao alone",
    (
        Step("rotation"),
        Step("low-rank"),
        *BEST.steps[1:],  # without its balance, which wins nothing behind a rotation: docs/timestep-groups.md
    ),
    {"weight_group_size": 32},
)

TFMQ = Recipe(
    "tfmq",
    "TFMQ-DM: temporal block reconstructed from t alone, one range per timestep for it; blocks reconstructed after it",
    (
        Step("weight-ranges", {"embedding_bits": 8}),
        Step("timestep-groups"),
        Step("activation-ranges"),
        Step("temporal-reconstruction"),
        Step("finite-set-ranges"),
        Step("block-reconstruction"),
    ),
)

TFMQ_PAPER = Recipe(
    "tfmq-paper",
    "TFMQ-DM with the settings and the exceptions of its released code (hours on a CPU)",
    (
        Step(
            "weight-ranges",
            {"keep_roles": ("first", "last", "temporal_first", "shortcut", "downsample")},
        ),
        Step("timestep-groups", {"method": "uniform", "groups": 1_000_000}),
        Step("activation-ranges", {"observer": "minmax"}),
        Step("temporal-reconstruction", {"preset": "paper"}),
        Step("finite-set-ranges"),
        Step(
            "block-reconstruction",
            {
                "method": "adaround",
                "iterations": 20_000,
                "learning_rate": 1e-3,
                "weight": 0.01,
                "relative": False,
                "quantize_inputs": False,
            },
        ),
    ),
    {"symmetric_weights": False},
)

BINARYDM = Recipe(
    "binarydm",
    "BinaryDM: one bit a weight; where training starts, see dq_plugins.passes.binarization",
    (
        Step("binarize"),
        Step("timestep-groups", {"groups": 1}),
        Step("activation-ranges"),
    ),
    {"symmetric_acts": True},
)
