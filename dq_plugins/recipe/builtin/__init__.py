"""Built-in recipes, registered by name through the package's entry points."""

from dq_plugins.recipe import Recipe, Step

FAST = Recipe(
    "fast",
    "a first look, good at 8 bits: min-max ranges in uniform timestep groups; costs seconds after sampling",
    (
        Step("weight-ranges", {"method": "minmax"}),
        Step("timestep-groups", {"method": "uniform"}),
        Step("activation-ranges", {"observer": "minmax"}),
    ),
)

RANGES = Recipe(
    "ranges",
    "ranges of least error in optimal timestep groups, from statistics of inputs alone; costs about what fast does",
    (
        Step("weight-ranges"),
        Step("timestep-groups"),
        Step("activation-ranges"),
    ),
)

ROUNDED = (
    Step("weight-ranges", {"embedding_bits": 8, "method": "later"}),
    Step("gptq"),
    Step("timestep-groups"),
)
TARGETS = {"condition_bits": 8}
DYNAMIC_WHERE_BETTER = {"observer": "by-width", "ranges": "measured"}
WIDTHS_OVER_TIME = Step(
    "group-widths",
    # as good as twice the probes of twice the runs, by the images of both bundled denoisers
    {
        "act_bits": "plan",
        "choices": (3, 4, 5, 6, 8),
        "seconds": 10.0,
        "probes": 4,
        "runs": 1,
        "where_possible": True,
    },
)
FEW_DIRECTIONS = Step(
    # small layers near the image count most, and bytes and time limit them already: `most` need not
    "low-rank",
    {"share": 0.1, "ranks": (1, 2, 4, 8, 16), "most": 1.0, "price": 0.3, "wide_price": 1.0},
)
"""For up to a tenth more bytes; on one model they keep the picture at 4 bits: docs/recipes.md."""
MANY_DIRECTIONS = Step(
    "low-rank",
    {"share": 0.5, "ranks": (1, 2, 4, 8, 16, 32), "most": 1.0, "price": 0.1, "wide_price": 1.0},
)
"""Half as many bytes again, where they count in the image: a third of the error of rank 16 everywhere."""
LEARNED = (
    # of wider weights, behind GPTQ, it wins nothing: docs/recipes.md
    Step("block-reconstruction", {"iterations": 100, "most_bits": 3, "samples": 80}),
    WIDTHS_OVER_TIME,
    Step("bias-correction"),
    Step(
        "learned-ranges",
        {
            "learn": ("ranges", "scales", "corrections"),
            "learning_rate": 1e-3,
            "passes": 1.5,
            "images": 2,
            "looks": 4,
        },
    ),
)

DEFAULT = Recipe(
    "default",
    "what most people should use: balanced inputs, weights rounded by GPTQ, dynamic ranges where they win, outputs "
    "corrected; costs 5 to 15 times the sampling that it observes",
    (
        Step("channel-balance"),
        *ROUNDED,
        Step("activation-ranges", DYNAMIC_WHERE_BETTER),
        Step("exempt-layers"),
        Step("bias-correction"),
    ),
    TARGETS,
)

BEST = Recipe(
    "best",
    "the best pictures, on torchao alone: default with a few directions in floating point, then learned against "
    "recorded outputs; inputs below 8 bits have widths over layers and time; costs 20 to 120 times the sampling that "
    "it observes",
    (
        Step("channel-balance"),
        FEW_DIRECTIONS,
        *ROUNDED,
        Step("activation-ranges", DYNAMIC_WHERE_BETTER),
        Step("exempt-layers"),
        *LEARNED,
    ),
    TARGETS,
)

LOW_BIT = Recipe(
    "low-bit",
    "for 4 bits and below, on torchao alone: best with more directions in floating point, half as many bytes again; "
    "costs about what best does",
    (
        Step("channel-balance"),
        MANY_DIRECTIONS,
        *ROUNDED,
        Step("activation-ranges", DYNAMIC_WHERE_BETTER),
        Step("exempt-layers"),
        *LEARNED,
    ),
    TARGETS,
)

MIXED_PRECISION = Recipe(
    "mixed-precision",
    "the best pictures at a mean number of bits, on torchao alone: every layer has the width that an exact program "
    "gives it, with principal directions of inputs in floating point; costs 50 to 150 times the sampling that it "
    "observes",
    (
        Step("channel-balance"),
        Step("low-rank"),
        Step("weight-ranges", {"embedding_bits": 8}),
        Step("timestep-groups"),
        Step("activation-ranges", DYNAMIC_WHERE_BETTER),
        # half the draws and checks of the pass lead to the same widths: docs/recipes.md
        Step(
            "sensitivity",
            {"weight_choices": (2, 3, 4, 5, 6, 8), "act_choices": None, "draws": 40, "check_entries": 16},
        ),
        Step("bit-allocation"),
        Step("gptq"),
        Step("exempt-layers"),
        WIDTHS_OVER_TIME,
        Step("bias-correction"),
    ),
    TARGETS,
)

TFMQ = Recipe(
    "tfmq",
    "TFMQ-DM: what depends on the timestep alone is reconstructed first, then the blocks; costs minutes",
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
    "TFMQ-DM with the settings and the exceptions of its released code; costs hours on a CPU",
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
    "BinaryDM: one bit a weight, as the start of training (docs/binarydm.md)",
    (
        Step("binarize"),
        Step("timestep-groups", {"groups": 1}),
        Step("activation-ranges"),
    ),
    {"symmetric_acts": True},
)
