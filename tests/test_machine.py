import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from embedlab._machine import reuse_memory
if sys.argv[1] == "reuse":
    reuse_memory()
b"x" * (int(sys.argv[2]) << 20)  # freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (int(sys.argv[2]) << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back to the system")
def test_freed_memory_is_used_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how, "64"]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert faults("reuse") < 16 < faults("as it is")  # 64 MB are 32 huge pages at the least
