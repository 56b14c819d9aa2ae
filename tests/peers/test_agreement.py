"""pyinf against kronfluence's committed scores and against explicit float64 gradients, on the same two tiny models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import agreement, reference_scores
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

import pyinf

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.safetensors"))


class Fixture:
    """One committed file: the model's weights, the tokens, and kronfluence's scores of them."""

    def __init__(self, path: Path, folder: Path) -> None:
        with safe_open(path, "pt") as file:
            self.metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        (folder / "config.json").write_text(self.metadata["config"])
        self.config = AutoConfig.from_pretrained(folder)
        self.weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
        self.train, self.queries = tensors["train"].long(), tensors["queries"].long()
        self.scores = tensors["scores"].numpy()
        self.damping = float(self.metadata["damping"])
        self.tracked = json.loads(self.metadata["tracked"])

    def model(self) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, "only the tied head may be absent"
        model.tie_weights()
        return model

    def examples(self, ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": row} for row in ids]


@pytest.fixture(params=FIXTURES, ids=lambda path: path.stem)
def fixture(request, tmp_path):
    return Fixture(request.param, tmp_path)


def test_there_is_a_fixture_of_each_family():
    assert len(FIXTURES) == 2
    assert sum(path.stat().st_size for path in FIXTURES) < 200_000


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_scores_equal_kronfluence(fixture, cache):
    attributor = pyinf.Attributor(
        fixture.model(), modules=fixture.tracked, damping=fixture.damping, fisher="empirical", cache=cache
    )
    scores = attributor.run(fixture.examples(fixture.train), fixture.examples(fixture.queries), batch_size=5)
    pearson, difference = agreement(scores.values.numpy(), fixture.scores)
    assert pearson >= 0.9999
    assert difference <= 1e-4


def test_default_layers_are_the_ones_kronfluence_was_given(fixture):
    attributor = pyinf.Attributor(fixture.model(), fisher="empirical")
    assert sorted(attributor.selection.names) == sorted(fixture.tracked)


def test_kronfluence_and_pyinf_equal_explicit_gradients_in_float64(fixture):
    train, queries = fixture.train.numpy(), fixture.queries.numpy()
    expected = reference_scores(fixture.model(), fixture.tracked, train, queries, fixture.damping)
    pearson, difference = agreement(fixture.scores, expected)
    assert pearson >= 0.999999
    assert difference <= 1e-5

    attributor = pyinf.Attributor(
        fixture.model().double(), modules=fixture.tracked, damping=fixture.damping, fisher="empirical"
    )
    scores = attributor.run(fixture.examples(fixture.train), fixture.examples(fixture.queries))
    pearson, difference = agreement(np.asarray(scores.values), expected)
    assert pearson >= 0.999999
    assert difference <= 1e-5
