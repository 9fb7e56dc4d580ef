"""The methods of the benchmark, by name."""

from amil_fast.mil import bag_methods
from amil_fast.mil.benchmark import rivals
from amil_fast.mil.benchmark.methods import BenchmarkMethod, Predictions, per_fold
from amil_fast.mil.benchmark.recipes import average, best_of, candidates, chosen_network
from amil_fast.mil.benchmark.torchmil_models import torchmil_model
from amil_fast.nn import POOLINGS

_POOLINGS = tuple(pooling.replace("_", "-") for pooling in POOLINGS)
_ALL = [
    BenchmarkMethod(
        "blend",
        "Gaussian process and extra trees, 2 : 1",
        lambda process, trees: Predictions(bag_methods.blended(process.probabilities, trees.probabilities)),
        parts=("gaussian-process", "extra-trees"),
    ),
    BenchmarkMethod("gaussian-process", "Gaussian process, 13 bag kernels", per_fold(bag_methods.gaussian_process)),
    BenchmarkMethod("extra-trees", "extra trees on bag mean, max, min", per_fold(bag_methods.extra_trees)),
    BenchmarkMethod("set-kernel-svm", "SVM with set kernel", per_fold(bag_methods.set_kernel_svm)),
    BenchmarkMethod(
        "logistic-regression", "logistic regression on bag means", per_fold(bag_methods.logistic_regression)
    ),
    BenchmarkMethod("network", "MI-RNet, pooling chosen on inner splits", best_of, parts=_POOLINGS),
    BenchmarkMethod("network-mean", "MI-RNet, mean over the poolings", average, parts=_POOLINGS),
    *(
        BenchmarkMethod(
            name, f"MI-RNet, {name.replace('-', ' ')} pooling", chosen_network(candidates(name.replace("-", "_")))
        )
        for name in _POOLINGS
    ),
    BenchmarkMethod("mi-net-ds", "MI-Net DS (Wang 2018)", rivals.mi_net_ds(peeking=True).run),
    BenchmarkMethod("mi-net-ds-clipped", "MI-Net DS, features clipped at ±3", rivals.mi_net_ds(clip=3.0).run),
    BenchmarkMethod("ilse", "attention (Ilse 2018)", rivals.attention().run),
    BenchmarkMethod("dsmil", "DSMIL (Li 2021)", rivals.dsmil().run),
    *(
        BenchmarkMethod(
            f"torchmil-{name}",
            f"torchmil: {model}",
            per_fold(torchmil_model(model, **arguments)),
            package="torchmil",
        )
        for name, model, arguments in (
            ("abmil", "ABMIL", {}),
            ("dsmil", "DSMIL", {}),
            ("transformer", "TransformerABMIL", {"transf_att_dim": 128}),
        )
    ),
]

METHODS: dict[str, BenchmarkMethod] = {method.name: method for method in _ALL}
