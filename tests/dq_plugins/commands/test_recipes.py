import json

from dq_plugins import registry
from dq_plugins.cli import main
from dq_plugins.recipe import Recipe, Step


def test_every_recipe_is_explained_pass_by_pass(capsys):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name in registry.names("recipe"):
        recipe = registry.get("recipe", name)
        assert f"\n{name}\n" in f"\n{text}"
        assert all(step in text for step in recipe.passes())


def test_json_has_what_a_pass_does_and_its_options(capsys):
    mine = Recipe("mine", "one pass", (Step("gptq", {"block": 64}),))
    with registry.temporary("recipe", "mine", mine):
        assert main(["recipes", "mine", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["summary"] == "one pass"
    assert found["passes"] == [
        {"pass": "gptq", "what": registry.find("pass", "gptq").summary, "options": {"block": 64}}
    ]
