"""Child processes of tests in which several of them train together."""

import socket
import subprocess

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ends(children, timeout=400):
    """Exit codes and outputs."""
    outputs = [child.communicate(timeout=timeout)[0] for child in children]
    return [child.returncode for child in children], outputs


def until(child, text):
    """Reads what a process prints, up to a line with this."""
    lines = []
    for line in child.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def kill(children):
    """What is left of them."""
    for child in children:
        child.kill()
        child.communicate()
