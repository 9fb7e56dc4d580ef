"""Benchmark of methods: protocol, resuming, statistics of the table, rivals, command."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from amil_fast.mil import benchmark
from amil_fast.mil.bag_files import check_bag_data, save_bags
from amil_fast.mil.benchmark import BenchmarkMethod, Predictions, recipes, rival_networks, rivals
from amil_fast.mil.classifiers import BagClassifiers
from amil_fast.mil.settings import MilSettings
from amil_fast.utils.files import DataError
from amil_fast.utils.optional import MissingDependency
from tests.cli.helpers import amil
from tests.mil.helpers import easy_bags

NETWORKS = ("mi-net-ds", "mi-net-ds-clipped", "ilse", "dsmil")
TORCHMIL = ("torchmil-abmil", "torchmil-dsmil", "torchmil-transformer")


def constant(name, probability):
    """Method that predicts one probability."""
    return BenchmarkMethod(
        name, name.upper(), lambda data, train, seed: Predictions(np.where(train, np.nan, probability))
    )


def few_epochs(monkeypatch, method):
    """The method with few epochs."""
    short = MilSettings(epochs=16, hidden=8, lr=1e-2, backend="reference")
    monkeypatch.setattr("amil_fast.mil.benchmark.torchmil_models._RECIPE", short)
    return benchmark.METHODS[method]


@pytest.mark.parametrize("method", NETWORKS)
def test_rivals_learn_from_the_training_part_only(method):
    data = easy_bags(24)
    train = data.folds[0]
    rival = benchmark.METHODS[method].run.__self__
    short = dataclasses.replace(rival, epochs=8, optimizer=lambda net: torch.optim.Adam(net.parameters(), 3e-3))
    predicted = short.run(data, train, 0)
    assert np.array_equal(np.isnan(predicted.probabilities), train)
    correct = (predicted.probabilities >= 0.5) == data.labels
    assert correct[~train].mean() > 0.8
    changed = dataclasses.replace(data, labels=np.where(train[0], data.labels, 1 - data.labels))
    again = short.run(changed, train[:1], 0).probabilities
    assert np.array_equal(short.run(data, train[:1], 0).probabilities, again, equal_nan=True)


@pytest.mark.parametrize("network", [rival_networks.MINetDS, rival_networks.AttentionNet, rival_networks.DSMIL])
def test_rival_networks_ignore_padding_and_order(network):
    torch.manual_seed(0)
    net = network(2, 5).eval()
    x, mask = torch.randn(2, 6, 5), torch.arange(6) < torch.tensor([[6], [4]])
    expected = net(x, mask)
    garbage = torch.where(mask[..., None], x, 100.0)
    assert torch.allclose(net(garbage, mask), expected, atol=1e-6)
    order = torch.tensor([3, 1, 0, 2, 4, 5])
    assert torch.allclose(net(x[:, order], mask), expected, atol=1e-6)
    alone = net(x[:, :4], mask[:, :4])
    assert torch.allclose(alone[:, 1], expected[:, 1], atol=1e-6)
    assert not torch.allclose(alone[:, 0], expected[:, 0], atol=1e-3)


def test_dsmil_network_equals_its_definition():
    torch.manual_seed(0)
    net = rival_networks.DSMIL(1, 5)
    x = torch.randn(1, 7, 5)
    bag, highest = net(x, torch.ones(1, 7, dtype=torch.bool))
    scores = net.instance_head(x)[0, :, 0]
    query, value = net.query(x)[0], net.value(x)[0]
    weights = torch.softmax(query @ query[scores.argmax()] / 128**0.5, 0)
    assert torch.allclose(bag, net.bag_head((weights @ value)[None, None])[0, 0], atol=1e-6)
    assert torch.allclose(highest, scores.max())


def test_peeking_takes_the_best_epoch_and_threshold():
    labels = np.array([0, 1, 1, 0])
    first = np.array([[0.1, 0.3, 0.2, np.nan], [np.nan, 0.7, 0.9, 0.8]])
    accuracies, moved = rivals.best_thresholds(first, labels)
    assert accuracies.tolist() == [1.0, 2 / 3]
    assert (moved[0, :3] >= 0.5).tolist() == [False, True, True] and np.isnan(moved[0, 3])
    later = np.array([[0.9, 0.1, 0.1, np.nan], [np.nan, 0.2, 0.3, 0.1]])
    accuracies, again = rivals.best_thresholds(later, labels, (accuracies, moved))
    assert accuracies.tolist() == [1.0, 1.0]
    assert np.array_equal(again[0], moved[0], equal_nan=True), "the earlier epoch was more accurate"
    assert (again[1, 1:] >= 0.5).tolist() == [True, True, False]


@pytest.mark.parametrize("method", TORCHMIL)
def test_torchmil_models(method, monkeypatch):
    data = easy_bags(24)
    train = data.folds[0, :1]
    predicted = few_epochs(monkeypatch, method).run(data, train, 0).probabilities
    assert np.array_equal(np.isnan(predicted), train)
    assert ((predicted >= 0.5) == data.labels)[~train].mean() > 0.8


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torchmil", None)
    with pytest.raises(MissingDependency, match="torchmil: needed for method 'torchmil-abmil'"):
        benchmark.run_benchmark({"easy": easy_bags()}, [benchmark.METHODS["torchmil-abmil"]], tmp_path)


def test_scales_are_chosen_on_inner_splits():
    assert [s.instance_scale for s in recipes.candidates("adjust")] == list(recipes.SCALES)
    assert {s.bag_scale for s in recipes.candidates("adjust")} == {10.0}
    assert all(s.bag_scale * s.instance_scale == pytest.approx(1) for s in recipes.candidates("attention"))
    assert len(recipes.candidates("max")) == 1
    data = easy_bags(30)
    train = data.folds[0]
    good = MilSettings(hidden=8, epochs=15, lr=1e-2, pooling="mean", backend="reference")
    bad = dataclasses.replace(good, lr=1e-9)
    chosen = recipes.chosen_network([bad, good])(data, train, 4)
    predicted = chosen.probabilities
    assert (chosen.inner_loss < 0.65).all()
    expected = BagClassifiers(data, good, train, [(4, fold) for fold in range(3)]).fit().predict(~train)
    np.testing.assert_allclose(predicted, expected, atol=1e-5)
    flipped = dataclasses.replace(data, labels=np.where(train[0], data.labels, 1 - data.labels))
    again = recipes.chosen_network([bad, good])(flipped, train[:1], 4).probabilities
    np.testing.assert_allclose(predicted[:1], again, atol=1e-5, err_msg="labels of the test part are not used")


def test_resumes_after_an_interruption(tmp_path):
    files = {"a": easy_bags(), "b": easy_bags(seed=1)}
    calls = []

    def counted(data, train, seed):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Predictions(np.where(train, np.nan, np.linspace(0, 1, len(data.labels))))

    method = BenchmarkMethod("counted", "counted", counted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_benchmark(files, [method], tmp_path)
    done = benchmark.load_results(files, [method], tmp_path)
    assert {key: sorted(value) for key, value in done.items()} == {("counted", "a"): [0, 1], ("counted", "b"): [0]}
    results = benchmark.run_benchmark(files, [method], tmp_path)
    assert len(calls) == 5 and calls[0] == calls[1] != calls[2] == calls[4], "a seed per repetition"
    assert all(sorted(value) == [0, 1] for value in results.values())
    kept = results["counted", "a"][1].probabilities
    train = files["a"].folds[1]
    assert np.array_equal(np.isnan(kept), train)
    np.testing.assert_allclose(kept[~train], np.tile(np.linspace(0, 1, 30), (3, 1))[~train], atol=1e-6)
    benchmark.run_benchmark(files, [method], tmp_path)
    assert len(calls) == 5


def test_blend_is_made_of_stored_parts(tmp_path):
    data = easy_bags(20)
    names = ("blend", "gaussian-process", "extra-trees")
    results = benchmark.run_benchmark({"easy": data}, [benchmark.METHODS[n] for n in names], tmp_path, repetitions=1)
    blend, *parts = (results[name, "easy"][0] for name in names)
    expected = benchmark.METHODS["blend"].run(*parts).probabilities
    np.testing.assert_allclose(blend.probabilities, expected, atol=1e-5)


def test_pooling_is_chosen_by_the_stored_loss_on_inner_splits(tmp_path, monkeypatch):
    losses = {"adjust": [0.4, 0.2, 0.3], "mean": [0.1, 0.3, 0.4]}
    for place, name in enumerate(benchmark.METHODS["network"].parts):
        loss = np.array(losses.get(name, [1, 1, 1]))
        run = lambda data, train, seed, p=place, loss=loss: Predictions(  # noqa: E731
            np.where(train, np.nan, p / 10), inner_loss=loss
        )
        monkeypatch.setitem(benchmark.METHODS, name, BenchmarkMethod(name, name, run))
    data = easy_bags()
    results = benchmark.run_benchmark({"easy": data}, [benchmark.METHODS["network"]], tmp_path, repetitions=1)
    network = results["network", "easy"][0]
    parts = benchmark.METHODS["network"].parts
    expected = [parts.index(name) / 10 for name in ("mean", "adjust", "adjust")]
    assert np.nanmax(network.probabilities, 1).tolist() == expected
    assert network.inner_loss.tolist() == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "0.json: expected a result with these bags, folds and seed"),
        ({"scale": 2}, "0.json: expected a result with these bags, folds and seed"),
        ({"content": '{"fingerprint": 1}'}, "0.json: expected a result with these bags"),
        ({"content": "[]"}, "0.json: expected a result of the benchmark, got list"),
        ({"drop": 1}, "0.json: expected a result of the benchmark: a probability for every bag"),
    ],
)
def test_other_results_are_refused(tmp_path, change, message):
    data = easy_bags()
    method = constant("half", 0.5)
    benchmark.run_benchmark({"easy": data}, [method], tmp_path)
    path = tmp_path / "results" / "easy" / "half" / "0.json"
    if "content" in change:
        path.write_text(change["content"])
    if "drop" in change:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"probabilities": [p[1:] for p in content["probabilities"]]}))
    changed = dataclasses.replace(data, features=data.features * change.get("scale", 1))
    with pytest.raises(DataError, match=message):
        benchmark.run_benchmark({"easy": changed}, [method], tmp_path, seed=change.get("seed", 0))


def test_empty_bags_are_refused(tmp_path):
    data = check_bag_data(np.ones((2, 1)), [0, 1, 1, 2], [0, 1, 1], np.array([[[1, 1, 0], [0, 1, 1]]]))
    with pytest.raises(DataError, match="easy: expected an instance in every bag, got bag 1 without"):
        benchmark.run_benchmark({"easy": data}, [constant("half", 0.5)], tmp_path)


def test_statistics_of_the_table():
    labels = np.array([0, 1, 0, 1])
    folds = np.array([[[1, 1, 0, 0], [0, 0, 1, 1]]] * 2, dtype=bool)
    data = check_bag_data(np.ones((4, 1)), range(5), labels, folds)

    def predictions(*rows):
        return {
            repetition: Predictions(np.where(folds[repetition], np.nan, row)) for repetition, row in enumerate(rows)
        }

    results = {
        ("a", "x"): predictions([0.1, 0.9, 0.2, 0.4], [0.1, 0.9, 0.7, 0.6]),  # right: 1, 1, 1/2, 1/2
        ("b", "x"): predictions([0.6, 0.9, 0.6, 0.4]),  # right: 0, 1, 0, 0
    }
    methods = [constant("b", 0), constant("a", 0), constant("absent", 0)]
    summary = benchmark.summarize(results, {"x": data}, methods, reference="b")
    a, b = summary["methods"]
    assert (a["name"], b["name"]) == ("a", "b") and a["repetitions"] == {"x": 2}
    assert a["accuracy"]["x"] == pytest.approx([0.75, np.std([1, 1, 0.5, 0.5], ddof=1) / 2])
    assert a["accuracy"]["mean"] == pytest.approx(a["accuracy"]["x"])
    # Repetition 0 only, which both have: 1 - 0, 1 - 1, 1 - 0, 0 - 0.
    assert a["difference"]["x"] == pytest.approx([0.5, np.std([1, 0, 1, 0], ddof=1) / 2])
    assert "difference" not in b and "peeking" not in a
    assert a["auc"]["x"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    lines = benchmark.to_markdown(summary).splitlines()
    assert lines[0] == "| method | repetitions | x | mean | mean − B |"
    assert lines[2] == "| A | 2 | .750 ± .144 / .750 | .750 ± .144 / .750 | +.500 ± .289 |"


def test_table_of_two_data_sets_with_peeking(tmp_path):
    files = {"x": easy_bags(), "y": easy_bags(seed=1)}

    def run(data, train, seed):
        right = np.where(train, np.nan, data.labels)
        return Predictions(np.where(train, np.nan, 0.1), right)

    methods = [BenchmarkMethod("p", "P", run), constant("one", 1.0)]
    results = benchmark.run_benchmark(files, methods, tmp_path)
    summary = benchmark.summarize(results, files, methods, reference="one")
    row = next(r for r in summary["methods"] if r["name"] == "p")
    assert row["peeking"]["mean"] == [1.0, 0.0] and row["peeking_gain"]["mean"][0] == pytest.approx(0.5)
    errors = [row["accuracy"][name][1] for name in files]
    assert row["accuracy"]["mean"][1] == pytest.approx(np.hypot(*errors) / 2)
    text = benchmark.to_markdown(summary)
    assert "| P | peeking | 1.000 ± .000 | 1.000 ± .000 | 1.000 ± .000 |" in text
    del results["p", "y"]
    partial = benchmark.summarize(results, files, methods, reference="one")
    assert [r["name"] for r in partial["methods"]] == ["one", "p"] and "mean" not in partial["methods"][1]["accuracy"]
    assert "| P | 2 | .500 ± .093 / .500 |  |  |  |" in benchmark.to_markdown(partial)
    benchmark.draw(tmp_path / "x.png", partial)
    assert (tmp_path / "x.png").stat().st_size > 5_000
    benchmark.draw(tmp_path / "x.png", summary)
    assert (tmp_path / "x.png").stat().st_size > 5_000


def test_command(tmp_path):
    for seed, name in enumerate(("a", "b")):
        data = easy_bags(12, seed)
        save_bags(tmp_path / f"{name}.npz", data.features, data.offsets, data.labels, data.folds)
    files = (tmp_path / "a.npz", tmp_path / "b.npz")
    out = tmp_path / "out"
    args = ("--method", "logistic-regression", "--method", "set-kernel-svm", "--reference", "set-kernel-svm")
    run = amil("mil", "benchmark", *files, *args, "--repetitions", 1, "--out", out)
    assert run.exit_code == 0, run.output
    summary = json.loads((out / "benchmark.json").read_text())
    assert {row["name"] for row in summary["methods"]} == {"logistic-regression", "set-kernel-svm"}
    assert summary["methods"][0]["repetitions"] == {"a": 1, "b": 1}
    assert "mean − SVM with set kernel" in (out / "benchmark.md").read_text()
    assert (out / "benchmark.png").stat().st_size > 5_000
    run = amil("mil", "benchmark", *files, "--method", "logistic-regression", "--out", out)
    rows = json.loads((out / "benchmark.json").read_text())["methods"]
    assert {row["name"]: row["repetitions"]["a"] for row in rows} == {"logistic-regression": 2, "set-kernel-svm": 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "forest"), "method: expected one of blend, gaussian-process"),
        (("--reference", "forest"), "method: expected one of blend, gaussian-process"),
    ],
)
def test_command_names_unknown_methods(tmp_path, args, message):
    data = easy_bags(12)
    save_bags(tmp_path / "a.npz", data.features, data.offsets, data.labels, data.folds)
    run = amil("mil", "benchmark", tmp_path / "a.npz", *args, "--out", tmp_path / "out")
    assert run.exit_code == 2 and message in run.output and "Traceback" not in run.output
    run = amil("mil", "benchmark", tmp_path / "b.npz", "--out", tmp_path / "out")
    assert run.exit_code == 2 and "b.npz: no such file" in run.output
