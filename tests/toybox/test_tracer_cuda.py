"""The tracer on a GPU gives the pictures of the CPU; where there is none, numba simulates one."""

import os
import subprocess
import sys

import numpy as np
import pytest

from dbcore.toybox.corpus import sample

pytest.importorskip("numba")
SCENES, SIZE = [sample(0, k) for k in (0, 7)], 8

RENDER = f"""
import sys, numpy as np
from dbcore.toybox.corpus import sample
from dbcore.toybox.tracer import pack
from dbcore.toybox.tracer_cuda import launch

out = np.zeros((2, {SIZE}, {SIZE}, 3), np.float32)
launch(pack([sample(0, 0), sample(0, 7)]), out)
np.save(sys.argv[1], out)
"""


def test_packed_scenes_give_the_pictures_of_single_ones():
    from dbcore.toybox.tracer import pack, render_array, render_packed

    alone = np.stack([render_array(*scene, SIZE) for scene in SCENES]) * 255 + 0.5
    np.testing.assert_array_equal(render_packed(pack(SCENES), SIZE), alone.astype(np.uint8))
    assert [view.flip for _, view in SCENES] == [False, True]


def test_the_kernel_gives_the_pictures_of_the_cpu(tmp_path):
    from numba import cuda

    from dbcore.toybox.tracer import render_array

    # the simulator runs Python, so what the kernel calls must not be compiled either
    simulator = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBA_DISABLE_JIT": "1"}
    simulated = {} if cuda.is_available() else simulator
    subprocess.run([sys.executable, "-c", RENDER, str(tmp_path / "out.npy")], check=True,
                   env={**os.environ, **simulated})
    alone = np.stack([render_array(*scene, SIZE) for scene in SCENES])
    assert abs(np.load(tmp_path / "out.npy") - alone).max() < 1.5 / 255
