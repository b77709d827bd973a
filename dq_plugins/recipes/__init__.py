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

DEFAULT = Recipe(
    "default",
    "error-minimising ranges in optimal timestep groups",
    (
        Step("weight-ranges"),
        Step("timestep-groups"),
        Step("activation-ranges"),
    ),
)

TFMQ = Recipe(
    "tfmq",
    "TFMQ-DM: the temporal block reconstructed from t alone, with one range per timestep",
    (
        Step("weight-ranges"),
        Step("temporal-reconstruction"),
        Step("timestep-groups", {"groups": 1}),
        Step("activation-ranges", {"observer": "minmax"}),
        Step("finite-set-ranges"),
    ),
)

BINARYDM = Recipe(
    "binarydm",
    "BinaryDM: one bit a weight; where training starts, see dq_plugins.binarization",
    (
        Step("binarize"),
        Step("timestep-groups", {"groups": 1}),
        Step("activation-ranges", {"symmetric": True}),
    ),
)
