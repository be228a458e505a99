"""The command line, in process where that will do: what is printed, what is written, and how errors end."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

import fastloss as fl
from fastloss import bench, cli
from fastloss.model import LinearModel

QUICK = ("--data", "digits", "--epochs", "1")
PICTURES = ("curves.png", "softmax_templates.png", "hinge_templates.png")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch, tmp_path):
    """No data set of the machine's, one timed call in place of seconds, and a folder to write into."""
    monkeypatch.delenv("FASTLOSS_DATA", raising=False)
    monkeypatch.setattr(cli, "ROUNDS", 1)
    monkeypatch.setattr(cli, "SECONDS", 0)
    monkeypatch.chdir(tmp_path)


def fails(capsys, *argv):
    """The one line on standard error of a command that ends with exit code 2."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(("fastloss: error: ", f"fastloss {argv[0] if argv else ''}".strip() + ": error: "))
    return captured.err


@pytest.fixture
def points(tmp_path):
    """A small data set: three clouds of points."""
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=90)
    X = 4 * np.eye(3)[y] + rng.normal(size=(90, 3))
    np.savez(tmp_path / "points.npz", X=X[:60], y=y[:60], X_test=X[60:], y_test=y[60:])
    return tmp_path / "points.npz"


# --- train ---------------------------------------------------------------------------------------------------------
def test_train_prints_results_and_writes_models_and_pictures(capsys, tmp_path):
    assert cli.main(["train", *QUICK, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data      digits: 1437 training and 360 test images of 8 × 8, 10 classes"
    assert lines[1].endswith(", 1 thread")
    for kind in ("softmax", "hinge"):
        settings, scores, times = (line.split() for line in lines if line.startswith(kind))
        assert settings[2:4] == ["1", "epochs"]
        loss, accuracy, test_loss, test_accuracy = map(float, scores[1:])
        assert loss < 1
        assert test_loss < 1
        assert accuracy > 0.85
        assert test_accuracy > 0.85
        assert all(float(text) > 0 for text in times[1:])
        trained = LinearModel.load(tmp_path / "out" / f"{kind}.npz")
        digits = fl.data.load_digits()
        assert trained.accuracy(digits.X_test, digits.y_test) == pytest.approx(test_accuracy, abs=5e-5)
        assert trained.class_names == digits.class_names
        assert trained.loss.lower().startswith(kind)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted((*PICTURES, "softmax.npz", "hinge.npz"))
    for name in PICTURES:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert name in lines[-1]


def test_printed_losses_are_those_of_the_definition(capsys, points):
    assert cli.main(["train", "--data", str(points), "--loss", "hinge", "--power", "2", "--penalty", "none"]) == 0
    scores = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("hinge")][1]
    trained, arrays = LinearModel.load("out/hinge.npz"), np.load(points)
    for X, y, loss in (("X", "y", scores[1]), ("X_test", "y_test", scores[3])):
        expected = fl.Hinge(power=2).value(trained.scores(arrays[X]), arrays[y])
        assert float(loss) == pytest.approx(expected, abs=1e-4)


def test_data_without_images_or_test_rows(capsys, tmp_path):
    np.savez(tmp_path / "xor.npz", X=[[0, 0], [0, 1], [1, 0], [1, 1]], y=[0, 1, 1, 0])
    assert cli.main(["train", "--data", "xor.npz", "--loss", "softmax", "--out", "a/b"]) == 0
    out = capsys.readouterr().out
    assert "xor.npz: 4 training and 0 test rows of 2 features, 2 classes" in out
    assert "no test data" in out
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == ["curves.png", "softmax.npz"]


def test_same_seed_same_model(points):
    options = ["train", "--data", str(points), "--loss", "hinge", "--epochs", "2", "--batch-size", "16"]
    for seed, out, threads in (("3", "a", "1"), ("3", "b", "2"), ("4", "c", "1")):
        assert cli.main([*options, "--seed", seed, "--out", out, "--threads", threads]) == 0
    a, b, c = (LinearModel.load(f"{name}/hinge.npz").W for name in "abc")
    assert a.tobytes() == b.tobytes() != c.tobytes()


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ((), "L2(strength=0.001)"),
        (("--strength", "0.5"), "L2(strength=0.5)"),
        (("--penalty", "l1", "--strength", "0.01"), "L1(strength=0.01)"),
        (("--penalty", "elasticnet", "--strength", "0.01"), "ElasticNet(strength=0.01, beta=1.0)"),
        (("--penalty", "maxnorm", "--strength", "2"), "MaxNorm(strength=2.0)"),
        (("--penalty", "none"), "no penalty"),
        (("--epochs", "3", "--batch-size", "7"), "3 epochs of batches of 7"),
        (("--step-size", "0.01", "--momentum", "0.5"), "step size 0.01 (cosine), momentum 0.5"),
    ],
)
def test_options_take_effect(capsys, points, options, settings):
    assert cli.main(["train", "--data", str(points), "--loss", "softmax", *options]) == 0
    assert settings in capsys.readouterr().out


def test_hinge_options_are_those_of_the_model(points):
    options = ("--margin", "2", "--power", "2", "--over", "max")
    assert cli.main(["train", "--data", str(points), "--loss", "hinge", "--epochs", "1", *options]) == 0
    assert LinearModel.load("out/hinge.npz").loss.startswith("Hinge(")
    for word in ("margin=2.0", "power=2", "over='max'"):
        assert word in LinearModel.load("out/hinge.npz").loss


def test_backend_and_threads_are_the_callers_again_afterwards(capsys, points):
    before = fl.get_num_threads()
    options = ("--backend", "reference", "--threads", str(before + 1), "--epochs", "1")
    assert cli.main(["train", "--data", str(points), *options]) == 0
    assert f"reference, {before + 1} threads" in capsys.readouterr().out
    assert fl.get_num_threads() == before


def test_cifar10_is_taken_where_the_environment_names_it(capsys, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"):
        records = rng.integers(256, size=(20, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
    (tmp_path / "batches.meta.txt").write_text("\n".join("abcdefghij"))
    monkeypatch.setenv("FASTLOSS_DATA", str(tmp_path))
    assert cli.main(["train", "--epochs", "1", "--loss", "softmax"]) == 0
    assert "cifar10: 100 training and 20 test images of 3 × 32 × 32, 10 classes" in capsys.readouterr().out
    assert (tmp_path / "out/softmax_templates.png").exists()


def test_falling_back_to_digits_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLOSS_DATA", str(tmp_path))
    assert cli.main(["train", "--epochs", "1", "--loss", "softmax"]) == 0
    captured = capsys.readouterr()
    assert "holds no CIFAR-10: the data are digits" in captured.err
    assert "digits: 1437" in captured.out


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (("--label-smoothing", "0.1"), "label_smoothing=0.1"),
        (("--temperature", "2"), "temperature=2.0"),
        (("--z-loss", "0.001"), "z_loss=0.001"),
        (("--softcap", "20"), "softcap=20.0"),
    ],
)
def test_softmax_options_are_those_of_the_model(points, options, setting):
    assert cli.main(["train", "--data", str(points), "--loss", "softmax", "--epochs", "1", *options]) == 0
    assert setting in LinearModel.load("out/softmax.npz").loss


# --- predict -------------------------------------------------------------------------------------------------------
def test_models_say_where_they_come_from(points):
    assert cli.main(["train", "--data", str(points), "--loss", "softmax", "--epochs", "2", "--seed", "7"]) == 0
    found = LinearModel.load("out/softmax.npz").provenance
    assert found["data"] == "points.npz: 60 training and 30 test rows of 3 features, 3 classes"
    assert "epochs=2" in found["training"]
    assert "seed=7" in found["training"]
    assert found["computed by"].startswith(f"fastloss {fl.__version__}, backend ")


def test_predict_shows_and_writes_what_the_model_finds(capsys, points, tmp_path):
    assert cli.main(["train", "--data", str(points), "--loss", "softmax"]) == 0
    model, arrays = LinearModel.load("out/softmax.npz"), np.load(points)
    expected = model.predict(arrays["X_test"])
    right = np.count_nonzero(expected == arrays["y_test"])
    capsys.readouterr()
    assert cli.main(["predict", "out/softmax.npz", "--data", str(points), "--out", "new/found.csv"]) == 0
    out = capsys.readouterr().out
    assert f"{right} of 30 rows are right: {100 * right / 30:.2f} %" in out
    assert "the test part is used" in out
    assert "points.npz: 60 training" in out
    with open("new/found.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["class"]) for row in rows] == expected.tolist()
    assert [int(row["true"]) for row in rows] == arrays["y_test"].tolist()
    assert [row["name"] for row in rows] == [str(k) for k in expected]

    np.savez("bare.npz", X=arrays["X_test"])
    assert cli.main(["predict", "out/softmax.npz", "--data", "bare.npz", "--out", "bare.csv", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "X (30, 3), no labels" in out
    assert "right" not in out
    with open("bare.csv", newline="", encoding="utf-8") as file:
        assert [int(row["class"]) for row in csv.DictReader(file)] == expected.tolist()


def test_predict_goes_by_the_names_of_classes(capsys, tmp_path):
    """In a test file of libsvm's a class and a feature may be missing."""
    (tmp_path / "a.libsvm").write_text("-1 1:1\n1 2:1\n3 3:1\n" * 20)
    (tmp_path / "b.libsvm").write_text("1 2:1\n3 3:1\n" * 2)
    (tmp_path / "c.libsvm").write_text("1 2:1\n")
    (tmp_path / "d.libsvm").write_text("5 2:1\n")
    assert cli.main(["train", "--data", "a.libsvm", "--loss", "hinge"]) == 0
    assert LinearModel.load("out/hinge.npz").class_names == ("-1", "1", "3")
    capsys.readouterr()
    for name, message in (("b", "4 of 4 rows are right"), ("c", "1 of 1 rows are right")):
        assert cli.main(["predict", "out/hinge.npz", "--data", f"{name}.libsvm"]) == 0
        assert message in capsys.readouterr().out
    assert "has the class '5'; the model knows -1, 1, 3" in fails(
        capsys, "predict", "out/hinge.npz", "--data", "d.libsvm"
    )


def test_predict_errors(capsys, points, tmp_path):
    assert cli.main(["train", "--data", str(points), "--loss", "softmax", "--epochs", "1"]) == 0
    capsys.readouterr()
    np.savez("wide.npz", X=np.zeros((2, 4)))
    for options, message in (
        (("nowhere.npz",), "nowhere.npz is no file"),
        (("points.npz",), "points.npz holds"),
        (("out/softmax.npz", "--data", "wide.npz"), "it must be (N, 3): the model has 3 features"),
        (("out/softmax.npz", "--data", "digits"), "digits has the class '3'; the model knows 0, 1, 2"),
        (("out/softmax.npz", "--data", str(points), "--out", "out"), "--out out is a folder"),
    ):
        assert message in fails(capsys, "predict", *options)


# --- gradcheck -----------------------------------------------------------------------------------------------------
def test_gradcheck_is_happy(capsys, points, tmp_path):
    assert cli.main(["gradcheck", "--data", str(points), "--n", "5", "--rows", "20", "--seed", "1"]) == 0
    out = capsys.readouterr().out
    assert "points.npz: 60 training and 30 test rows of 3 features, 3 classes; 20 training rows are used" in out
    for kind in ("softmax", "hinge"):
        table = out.split(f"\n\n{kind}")[1].splitlines()
        assert table[0].split() == ["class", "feature", "analytic", "numerical", "rel.", "error", "kinks", "verdict"]
        assert all(line.endswith(("happy", "fine", "kink")) for line in table[1:6])
        assert any("bias" in line for line in table[1:6])
        assert "relative error at most" in table[6]
        analytic, numerical = (float(text) for text in table[1].split()[2:4])
        assert analytic == pytest.approx(numerical, rel=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["points.npz"]


@pytest.mark.parametrize(
    "options",
    [
        ("--loss", "hinge", "--power", "2", "--over", "max", "--penalty", "l1", "--strength", "0.1"),
        ("--loss", "softmax", "--label-smoothing", "0.1", "--penalty", "elasticnet", "--strength", "0.1"),
        ("--loss", "softmax", "--softcap", "2", "--temperature", "3"),
        ("--loss", "hinge", "--over", "mean", "--penalty", "maxnorm", "--strength", "0.1", "--backend", "reference"),
        ("--loss", "logistic", "--over", "mean", "--label-smoothing", "0.1", "--pos-weight", "3"),
    ],
)
def test_gradcheck_of_any_loss_and_penalty(points, options):
    assert cli.main(["gradcheck", "--data", str(points), "--n", "12", *options]) == 0


def test_gradcheck_in_float32_says_what_it_is_worth(capsys, points):
    assert cli.main(["gradcheck", "--data", str(points), "--loss", "softmax", "--dtype", "float32", "--n", "12"]) == 0
    assert "fine for an objective with kinks, which this is not" in capsys.readouterr().out


def test_gradcheck_finds_a_mistake(capsys, monkeypatch, points):
    right = fl.LinearObjective.value_and_grad
    monkeypatch.setattr(fl.LinearObjective, "value_and_grad", lambda *args: (right(*args)[0], -right(*args)[1]))
    assert cli.main(["gradcheck", "--data", str(points), "--loss", "softmax"]) == 1
    assert "relative error at most 2.0e+00 (h 1e-05): the gradient is probably wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--n", "0"), "n is 0; it must be at least 1"),
        (("--rows", "0"), "rows is 0"),
        (("--h", "0"), "h is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--data", "nowhere"), "--data nowhere does not exist"),
        (("--loss", "hinge", "--temperature", "2"), "--temperature is an option of the softmax loss"),
        (("--penalty", "l1"), "--penalty l1 needs --strength"),
    ],
)
def test_gradcheck_errors(capsys, points, options, message):
    assert message in fails(capsys, "gradcheck", "--data", str(points), *options)


# --- errors --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "nowhere"), "--data nowhere does not exist; name a folder"),
        (("--data", "nowhere.npz"), "nowhere.npz is no file"),
        (("--data", "."), ". holds neither data_batch_1.bin"),
        (("--data", "text.txt"), "text.txt is empty; expected at least one row"),
        (("--epochs", "many"), "argument --epochs: invalid int value: 'many'"),
        ((*QUICK, "--epochs", "-1"), "epochs is -1; it must be at least 0"),
        ((*QUICK, "--momentum", "1"), "momentum is 1.0; it must be below 1"),
        ((*QUICK, "--step-size", "nan"), "step_size is nan"),
        ((*QUICK, "--strength", "-1"), "strength is -1.0"),
        ((*QUICK, "--threads", "0"), "n is 0; it must be at least 1"),
        ((*QUICK, "--backend", "abacus"), "backend is 'abacus'; it must be one of"),
        ((*QUICK, "--loss", "squared"), "argument --loss: invalid choice: 'squared'"),
        ((*QUICK, "--loss", "softmax", "--margin", "2"), "--margin is an option of the hinge loss"),
        ((*QUICK, "--loss", "softmax", "--over", "sum"), "--over is an option of the hinge and the logistic loss"),
        ((*QUICK, "--loss", "logistic", "--over", "max"), "over is 'max'; it must be one of 'sum', 'mean'"),
        ((*QUICK, "--penalty", "none", "--strength", "1"), "--strength has no meaning with --penalty none"),
        ((*QUICK, "--penalty", "l1"), "--penalty l1 needs --strength"),
        ((*QUICK, "--out", "text.txt"), "text.txt is no folder"),
        ((*QUICK, "--out", "text.txt/below"), "text.txt is no folder"),
        ((*QUICK, "--step-size", "1e30", "--loss", "hinge"), "use a smaller one"),
        (("--epoch", "1"), "unrecognized arguments: --epoch 1"),
    ],
)
def test_errors_are_one_line_and_leave_nothing_behind(capsys, tmp_path, options, message):
    (tmp_path / "text.txt").write_text("")
    assert message in fails(capsys, "train", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_command_is_needed(capsys):
    assert "required: COMMAND (see fastloss --help)" in fails(capsys)


def test_a_missing_extra_is_named_before_training(capsys, monkeypatch, points):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(cli, "sgd", None)
    assert 'pip install "fastloss[cli]"' in fails(capsys, "train", "--data", str(points))


def test_a_failed_write_keeps_the_file_that_was_there(capsys, monkeypatch, points, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/curves.png").write_text("old")

    def half(figure, file, **options):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", half)
    assert "no space left on device" in fails(capsys, "train", "--data", str(points), "--loss", "softmax")
    assert (tmp_path / "out/curves.png").read_text() == "old"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["curves.png", "softmax.npz"]


def test_interrupted_training_writes_nothing(capsys, monkeypatch, points, tmp_path):
    def interrupt(state):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_Reporter", lambda *args: interrupt)
    assert cli.main(["train", "--data", str(points)]) == 130
    assert capsys.readouterr().err == "fastloss: interrupted; nothing was written\n"
    assert not (tmp_path / "out").exists()


# --- info, bench, help ---------------------------------------------------------------------------------------------
def test_info_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("FASTLOSS_DATA", "somewhere")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert fl.__version__ in text
    for info in fl.list_backends():
        assert f"  {info.name} " in text
        assert info.reason in text
    for word in ("kernels", "threads", "BLAS", "Python", "numpy", "FASTLOSS_DATA"):
        assert f"\n{word} " in text


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fastloss"] == fl.__version__
    assert facts["threads"] == fl.get_num_threads()
    assert facts["backends"] == [info._asdict() for info in fl.list_backends()]
    levels = [name for name, level in facts["kernels"]["levels"].items() if level["available"]]
    assert facts["kernels"]["level"] in levels
    assert isinstance(facts["kernels"]["openmp"], bool)


def test_bench_hands_over(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "main", lambda args: seen.append(args) or 3)
    assert cli.main(["bench", "--quick"]) == 3
    assert seen[0].quick is True


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in ("train", "gradcheck", "lecture", "demo", "predict", "info", "bench"))]
)
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "\n  fastloss " in text


def test_the_module_runs_without_a_terminal(tmp_path):
    command = [sys.executable, "-m", "fastloss", "train", *QUICK, "--loss", "softmax"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "softmax_templates.png" in done.stdout
    assert done.stderr == ""


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastloss {fl.__version__}\n"
