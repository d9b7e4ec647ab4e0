"""A child dies with its parent, however the parent ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from splitllm.deployment.leash import VARIABLE, Leash, wear

CHILD = "from splitllm.deployment.leash import wear; import time; wear(); print('up', flush=True); time.sleep(60)"
PARENT = f"""
import os, subprocess, sys, time
from splitllm.deployment.leash import Leash
leash = Leash()
child = subprocess.Popen(
    [sys.executable, "-c", {CHILD!r}], env=dict(os.environ, **leash.environment()), pass_fds=[leash.child_end],
    stdout=subprocess.PIPE, start_new_session=True,
)
child.stdout.readline()
print("up", flush=True)
time.sleep(60)
"""


def test_a_child_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
    [child] = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    descriptor = os.pidfd_open(int(child))
    parent.kill()
    parent.communicate()
    assert select.select([descriptor], [], [], 10)[0], "the child lives on"
    os.close(descriptor)


def test_a_child_dies_when_the_leash_is_closed() -> None:
    leash = Leash()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        env={**os.environ, **leash.environment()},
        pass_fds=[leash.child_end],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    assert child.poll() is None
    leash.close()
    assert child.wait(10) == -signal.SIGKILL
    child.stdout.close()


def test_without_a_leash_nothing_is_watched() -> None:
    assert VARIABLE not in os.environ
    wear()
