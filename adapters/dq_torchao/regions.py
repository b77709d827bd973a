"""Regional compilation: repeated blocks are compiled one by one, and blocks of one kind share what was compiled.

The first call of a compiled denoiser takes minutes, most of it for blocks that look alike. Compiled on their own, the
first of a kind is compiled and the others reuse it. The price is that nothing is merged across block borders, and that
every block checks on its own whether it is what was compiled: a step is slower than that of a wholly compiled denoiser.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from dq_plugins.errors import DQError


def repeated_blocks(denoiser: nn.Module) -> list[str]:
    """Names of the blocks that a denoiser repeats: entries of module lists whose class occurs there more than once.

    Blocks within blocks are left out. Entries without parameters (dropout, activation functions) are not blocks.

    Example:
        >>> class Block(nn.Linear): ...
        >>> repeated_blocks(nn.ModuleDict({"layers": nn.ModuleList(Block(2, 2) for _ in range(2)), "out": Block(2, 2)}))
        ['layers.0', 'layers.1']
    """
    entries = {
        f"{name}.{key}" if name else key: entry
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        for key, entry in module.named_children()
        if next(entry.parameters(), None) is not None or next(entry.buffers(), None) is not None
    }
    kinds = Counter(type(entry) for entry in entries.values())
    repeated = [name for name, entry in entries.items() if kinds[type(entry)] > 1]
    return [name for name in repeated if not any(name.startswith(f"{other}.") for other in repeated)]


def compile_regions(denoiser: nn.Module, **options: Any) -> list[str]:
    """Compile the repeated blocks of ``denoiser``, in place, at their first call.

    Leave ``torch._inductor.config.freezing`` off: integer layers gain nothing by it, and refuse it here, because it
    would compile every block again and freeze the timestep group of one call into each.

    Args:
        denoiser: full precision or quantized.
        options: for ``torch.compile``; ``fullgraph=True`` unless said otherwise.

    Returns:
        Names of the compiled blocks.

    Raises:
        DQError: nothing repeats; compile the denoiser as a whole.
    """
    names = repeated_blocks(denoiser)
    if not names:
        raise DQError(
            f"{type(denoiser).__name__} has no repeated blocks (no module list in which a class occurs twice), so "
            "regional compilation gains nothing: torch.compile the denoiser as a whole"
        )
    for name in names:
        denoiser.get_submodule(name).compile(**{"fullgraph": True, **options})
    return names
