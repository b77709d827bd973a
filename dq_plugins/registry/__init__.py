"""Named plugins: passes, observers, metrics, solvers, adapters and recipes.

An installed distribution declares its plugins as entry points, and the built-in ones are declared the same way::

    [project.entry-points."dq_plugins.observers"]
    my-observer = "my_package.my_module:MyObserver [torchao]"   # in brackets: extras that must be installed

    [project.entry-points."dq_plugins.api"]                     # the plugin API it is written for; v1 if left out
    version = "v1"
    "observer.my-observer" = "v2"                               # of one plugin, where it differs

Code of the running process registers with the decorator `register`. Names are read from metadata when this package
is imported; code is loaded when `get` first asks for it. ``DQ_PLUGINS`` allows and denies: `dq_plugins.registry.rules`.
"""

from dq_plugins.registry.plugin import GROUPS, KINDS, Kind, Location, Plugin
from dq_plugins.registry.store import (
    State,
    find,
    function,
    get,
    names,
    plugins,
    register,
    status,
    temporary,
    unmatched_terms,
)

__all__ = [
    "GROUPS", "KINDS", "Kind", "Location", "Plugin", "State", "find", "function", "get", "names", "plugins", "register",
    "status", "temporary", "unmatched_terms",
]  # fmt: skip
