"""The command line as a person uses it, in processes of its own.

taskvm.cli, taskvm.cli.group, taskvm.cli.options, taskvm.cli.run, taskvm.cli.image, taskvm.cli.doctor, taskvm.doctor.
"""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.processes import children_of, qemu_of
from tests.support.waiting import PATIENCE_S

from taskvm.vm.rundir import run_base

pytestmark = pytest.mark.vm

TASKVM = [str(Path(sys.executable).with_name("taskvm"))]
SMALL = ["--cpus", "1", "--memory", "256", "-q"]


def taskvm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]  # options are subprocess.run's
        [*TASKVM, *arguments],
        **{"capture_output": True, "text": True, "timeout": PATIENCE_S, **options},
    )


def test_output_and_exit_status_pass_through() -> None:
    """Both streams and the status are the command's."""
    done = taskvm("run", *SMALL, "--", "sh", "-c", "echo out; echo err >&2; exit 9")

    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 9)


def test_standard_input_is_passed_on() -> None:
    """A pipe into taskvm is a pipe into the guest's command."""
    done = taskvm("run", *SMALL, "--", "sha256sum", input="hello\n")

    assert done.stdout.startswith(
        "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    )


def test_a_folder_is_mounted_and_is_the_working_directory(tmp_path: Path) -> None:
    """--mount HOST:GUEST writes through; with :ro nothing changes."""
    (tmp_path / "in").write_text("seen")
    writes = taskvm(
        "run", *SMALL, "--mount", f"{tmp_path}:/workspace", "--", "sh", "-c", "cat in; echo x > out"
    )
    reads = taskvm(
        "run", *SMALL, "--mount", f"{tmp_path}:/workspace:ro", "--", "sh", "-c", "echo y > out"
    )

    assert writes.stdout == "seen"
    assert reads.returncode != 0
    assert (tmp_path / "out").read_text() == "x\n"


def test_a_timeout_has_its_own_status() -> None:
    """--timeout kills the command and exits with 124, as timeout(1) does."""
    done = taskvm("run", *SMALL, "--timeout", "1", "--", "sleep", "60")

    assert done.returncode == 124
    assert "killed after 1 s" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--mount", "nowhere", "--", "true"],
        ["--mount", "/does/not/exist:/workspace", "--", "true"],
        ["--env", "NOEQUALS", "--", "true"],
        ["--timeout", "0", "--", "true"],
        ["--timeout", "nan", "--", "true"],
        ["--allow", "*", "--", "true"],
        ["--image", "nosuch", "--", "true"],
        ["--checkpoint", "nosuch", "--", "true"],
        ["--secret", "MISSING_VARIABLE@a.example", "--allow", "a.example", "--", "true"],
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(arguments: list[str]) -> None:
    """Usage errors name the option and do not show a traceback."""
    done = taskvm("run", *SMALL, *arguments)

    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_secret_on_the_command_line_is_refused_and_not_repeated() -> None:
    """The value would be readable by every user of the host; the error does not print it again."""
    done = taskvm("run", *SMALL, "--secret", "TOKEN@a.example=canary-77f2", "--", "true")

    assert done.returncode == 2
    assert "canary-77f2" not in done.stderr


def test_a_program_that_is_not_there_is_an_error_without_a_traceback() -> None:
    """The guest's reason is printed, and where programs come from; the status is that of a shell."""
    done = taskvm("run", *SMALL, "--", "no-such-program")

    assert done.returncode == 127
    assert "No such file or directory" in done.stderr
    assert "taskvm image build --include" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_program_has_the_status_of_a_shell() -> None:
    done = taskvm("run", *SMALL, "--", "/etc/passwd")

    assert done.returncode == 126
    assert "Permission denied" in done.stderr


def test_ctrl_c_ends_everything_quietly() -> None:
    """An interrupt stops the command, removes the sandbox and exits with 130."""
    process = subprocess.Popen(
        [*TASKVM, "run", *SMALL, "--", "sh", "-c", "echo up; sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"

    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_end_from_outside_releases_the_sandbox(number: signal.Signals) -> None:
    """kill(1), and a terminal that closes, leave nothing behind; the status names the signal."""
    process = subprocess.Popen(
        [*TASKVM, "run", *SMALL, "--", "sh", "-c", "hostname; sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    directory = run_base() / process.stdout.readline().strip()
    assert directory.is_dir()

    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_S)

    assert (process.returncode, stderr) == (128 + number, "")
    assert not directory.exists()


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    """`taskvm run … | head -1` stops an endless command; the status is that of any program in such a pipe."""
    process = subprocess.Popen(
        [*TASKVM, "run", *SMALL, "--", "yes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"y\n"

    process.stdout.close()

    assert process.wait(timeout=PATIENCE_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_output_that_cannot_be_written_is_one_line() -> None:
    """A full disk behind `>` is a failure with its reason."""
    with open("/dev/full", "wb") as full:
        done = taskvm(
            "run", *SMALL, "--", "echo", "lost", capture_output=False, stdout=full,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    assert done.returncode == 125
    assert done.stderr == "taskvm: write the command's output: No space left on device\n"


def test_a_closed_standard_output_is_nobody_elses_file() -> None:
    """With `>&-` the output goes nowhere, and not into the file that got the number 1."""
    shell = f'exec "{TASKVM[0]}" run {" ".join(SMALL)} -- sh -c "echo lost; exit 7" >&-'

    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=PATIENCE_S)

    assert (done.returncode, done.stderr) == (7, "")


def test_a_machine_that_dies_is_one_line() -> None:
    """QEMU killed in the middle of a command: a reason, the status of a failure, no traceback."""
    process = subprocess.Popen(
        [*TASKVM, "run", *SMALL, "--", "sh", "-c", "echo up; sleep 600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (supervisor,) = children_of(process.pid)

    os.kill(qemu_of(supervisor), signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == 125
    assert stderr.startswith("taskvm: ")
    assert stderr.count("\n") == 1


def test_a_terminal_stays_blocking() -> None:
    """Reading standard input does not make the terminal non-blocking for what comes after."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*TASKVM, "run", *SMALL, "--", "sh", "-c", "read line; echo got $line"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.write(leader, b"typed\n")
    assert process.wait(timeout=PATIENCE_S) == 0
    blocking = os.get_blocking(follower)
    os.close(follower)
    output = b""
    try:
        while data := os.read(leader, 4096):
            output += data
    except OSError:
        pass  # the last writer is gone
    os.close(leader)

    assert blocking
    assert b"got typed" in output


def test_doctor_explains_the_accelerator() -> None:
    """The JSON names every check; an accelerator that is not used says why."""
    done = taskvm("doctor", "--json")
    findings = {item["name"]: item for item in json.loads(done.stdout)}

    assert done.returncode == 0
    assert {"qemu", "accelerator", "confinement", "image", "disk"} <= findings.keys()
    text = findings["accelerator"]["text"]
    assert "proven" in text or "KVM is not used: " in text


def test_doctor_reports_a_fault_with_a_remedy() -> None:
    """Without QEMU in PATH the fault and the way to mend it are printed, and the status is 1."""
    done = taskvm("doctor", env={**os.environ, "PATH": "/nonexistent"})

    assert done.returncode == 1
    assert "apt-get install qemu" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("No sandbox can start here: mend qemu")


def test_a_directory_that_is_not_there_is_named() -> None:
    done = taskvm("run", *SMALL, "--cwd", "/no/such", "--", "true")

    assert done.returncode == 125
    assert "enter /no/such to run 'true'" in done.stderr


def test_a_damaged_image_is_listed_beside_the_others(tmp_path: Path) -> None:
    """It does not hide them, and the status says that something is wrong."""
    damaged = tmp_path / "images" / ("ab" * 32)
    damaged.mkdir(parents=True, mode=0o700)

    done = taskvm("image", "list", env={**os.environ, "TASKVM_CACHE": str(tmp_path)})

    assert done.returncode == 1
    assert done.stdout.startswith("abababababab  DAMAGED  manifest.json: ")


def test_images_are_listed_and_shown() -> None:
    """`image list` and `image show` agree on the default image."""
    listed = taskvm("image", "list").stdout
    as_json = json.loads(taskvm("image", "list", "--json").stdout)
    shown = json.loads(taskvm("image", "show", "default").stdout)

    assert shown["digest"][:12] in listed
    assert [each["digest"] for each in as_json if "default" in each["names"]] == [shown["digest"]]
    assert "git" in shown["packages"]


@pytest.mark.parametrize("count", [1, 7])
def test_what_was_refused_is_named_at_the_end(count: int) -> None:
    """Each host once, five at most; programs of the guest only saw that a name does not exist. Not with --quiet."""
    asking = f"for n in $(seq {count}); do getent ahostsv4 host$n.test; getent ahostsv4 host$n.test; done; exit 3"

    loud = taskvm("run", *SMALL[:-1], "--", "sh", "-c", asking)
    quiet = taskvm("run", *SMALL, "--", "sh", "-c", asking)

    told = [line for line in loud.stderr.splitlines() if line.startswith("taskvm: refused: ")]
    hosts = range(1, min(count, 5) + 1)
    assert told == [f"taskvm: refused: host{n}.test: no rule allows this host" for n in hosts]
    assert ("taskvm log --denied" in loud.stderr) is (count > 5)
    assert (loud.returncode, quiet.returncode, quiet.stderr) == (3, 3, "")
