import sys
from pathlib import Path

import pytest

from preceptor.model.peak import peak_memory_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_the_process_in_bytes():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kernel_bytes = int(fields["VmHWM"].removesuffix("kB")) * 1024
    assert peak_memory_bytes("cpu") == pytest.approx(kernel_bytes, rel=0.01)
