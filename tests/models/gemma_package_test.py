"""Google's package is imported without its training dependencies, and the stand-ins for them stay invisible."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(code):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env
    ).stdout


def test_neither_tensorflow_nor_a_trainer_is_imported_and_both_can_be_imported_later():
    shown = run(
        "import sys\n"
        "import gemma_scope_jax.training.loop, gemma_scope_jax.cli.evaluate\n"
        "print([name for name in ('tensorflow', 'kauldron.train', 'pandas', 'sklearn') if name in sys.modules])\n"
        "from gemma import gm\n"
        "print(gm.ckpts.load_params.__name__)\n"
        "import tensorflow as tf\n"
        "print(tf.constant([1.0]).shape)\n"
    )
    assert shown.splitlines() == ["[]", "load_params", "(1,)"]


def test_modules_imported_before_stay():
    code = "import tensorflow; from gemma_scope_jax.models import gemma_package; print(tensorflow.__version__[0])"
    assert run(code).strip() == "2"
