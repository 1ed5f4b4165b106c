"""Runs all tests but the stress tests, in two processes side by side: many only wait for other hosts.

Arguments are pytest's, for both: ``python tools/run_tests.py -k future -x``.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

#: Files of tests/integration that start servers, cut lines, or make environments.
WAITING = ("bad_lines", "check_manager", "copies", "firewall", "heartbeat", "python_pairs", "ssh*", "watcher")
NOTHING_TO_DO = 5  # pytest's exit code when no test was selected
#: Seconds that the second may take longer. A test is ended after two minutes; what follows the tests is not.
LONGEST = 900


def main(arguments: list[str]) -> int:
    """Run both; the first one's output comes as it is made, the other's at the end."""
    folder = Path("tests/integration")
    waiting = sorted(str(path) for name in WAITING for path in folder.glob(f"test_{name}.py"))
    pytest = [sys.executable, "-m", "pytest", "-q"]
    rest = ["--doctest-modules", "--ignore=tests/stress", *(f"--ignore={path}" for path in waiting)]
    with tempfile.TemporaryFile() as output:
        second = subprocess.Popen([*pytest, *waiting, *arguments], stdout=output, stderr=subprocess.STDOUT)
        try:
            first = subprocess.call([*pytest, *rest, "shmdist", "tests", *arguments])
        finally:
            try:
                other = second.wait(LONGEST)
            except subprocess.TimeoutExpired:
                second.kill()
                other = second.wait()
                sys.stderr.write(f"the second did not end, and was killed {LONGEST} s after the first\n")
            output.seek(0)
            sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    if NOTHING_TO_DO in (first, other):
        return min(first, other)  # one had nothing to do, or both had
    return max(abs(first), abs(other))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
