from __future__ import annotations

import pytest
import torch
from torch import nn

from dq_plugins.hooks import hooked


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}


def test_functions_are_told_the_name_and_may_replace_arguments_and_output():
    modules, x = layers(), torch.ones(1, 2)
    seen = []
    with hooked(
        modules,
        before=lambda name, args, kwargs: ((args[0] * 2,), kwargs) if name == "a" else None,
        after=lambda name, args, kwargs, y: seen.append((name, args[0])) or y + 1,
    ):
        a, b = modules["a"](x), modules["b"](x)
    assert [name for name, _ in seen] == ["a", "b"]
    assert torch.equal(seen[0][1], 2 * x)
    assert torch.equal(a, modules["a"](2 * x) + 1)
    assert torch.equal(b, modules["b"](x) + 1)


def test_keyword_arguments_are_seen_and_passed_on():
    modules = layers()
    with hooked(modules, before=lambda name, args, kwargs: (args, {"input": kwargs["input"] * 0})):
        assert torch.equal(modules["a"](input=torch.ones(1, 2)), modules["a"].bias[None])


def test_the_first_hook_sees_what_others_have_not_changed_yet():
    modules, seen = layers(), []
    with (
        hooked(modules, before=lambda name, args, kwargs: ((args[0] * 2,), kwargs)),
        hooked(modules, before=lambda name, args, kwargs: seen.append(args[0]), first=True),
    ):
        modules["a"](torch.ones(1, 2))
    assert torch.equal(seen[0], torch.ones(1, 2))


def test_nothing_is_left_behind_by_an_error_inside_or_while_hooking():
    modules = layers()
    with pytest.raises(KeyError), hooked(modules, before=lambda *_: None, after=lambda *_: None):
        raise KeyError
    with pytest.raises(AttributeError), hooked({**modules, "c": None}, before=lambda *_: None):
        pass
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules.values())
