"""Start scripts without importing torch every time, which takes longer than most tests.

A server process imports torch once and then forks a child for each script. The child is a process
of its own: it runs the script as __main__, prints, fails and exits as under `python SCRIPT`.

With ranks > 0 there are several children, with the environment that torchrun gives to its workers.
What torchrun itself does, restarts and signals, is tested with torchrun (test_reliability.py).

The server reads requests from its standard input and writes exit codes to its standard output, one
line of JSON each."""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
READY = "ready"
TIMEOUT = 7200  # seconds, after which a script is ended


class Launcher:
    """The client's side: starts the server, and has it run one script after another."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)],
            env={**os.environ, "PYTHONPATH": ROOT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.receive() == READY
        atexit.register(self.close)

    def close(self):
        self.server.stdin.close()  # the server ends when there is nothing left to read
        self.server.wait()

    def receive(self):
        line = self.server.stdout.readline()
        assert line, "the server of tests/launcher.py has ended"
        return json.loads(line)

    def run(self, command, cwd, environment, stdin=None, ranks=0):
        """Run `SCRIPT ARGUMENTS` or `-m MODULE ARGUMENTS`; returns a subprocess.CompletedProcess.

        With ranks > 0 so many processes run it, which find each other as under torchrun."""
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: os.path.join(folder, name) for name in ("stdin", "stdout", "stderr")}
            with open(paths["stdin"], "w", encoding="utf-8") as f:
                f.write(stdin or "")
            request = {
                "command": command,
                "cwd": str(cwd),
                "environment": environment,
                "ranks": ranks,
                "paths": paths,
            }
            print(json.dumps(request), file=self.server.stdin, flush=True)
            code = self.receive()
            with open(paths["stdout"], encoding="utf-8") as f:
                stdout = f.read()
            with open(paths["stderr"], encoding="utf-8") as f:
                stderr = f.read()
        return subprocess.CompletedProcess(command, code, stdout, stderr)


def import_torch():
    """Import what every script imports, and what torch itself imports later."""
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sentencepiece  # noqa: F401
    import torch
    import torch.distributed.fsdp  # noqa: F401
    import tqdm  # noqa: F401

    torch.nn.init.normal_(torch.empty(1, device="meta"))  # imports torch's reference operators
    gc.collect()
    gc.freeze()  # a child need not look through torch's objects when it ends


def redirect(request):
    """Give this process the standard streams, the folder and the environment of a request."""
    streams = (
        (sys.stdin, "stdin", os.O_RDONLY),
        (sys.stdout, "stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (sys.stderr, "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    )
    for stream, name, flags in streams:
        descriptor = os.open(request["paths"][name], flags)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    sys.stdin = open(0, encoding="utf-8")  # without what the server's own stdin has buffered
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.alarm(TIMEOUT)


def run_as_main(command):
    """Run a script or a module with its arguments, as `python` does."""
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
        runpy.run_path(command[0], run_name="__main__")


def rank_environments(ranks):
    """What torchrun adds to the environment of each rank on one machine; nothing for ranks=0."""
    if not ranks:
        return [{}]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_for(children):
    """The exit code of the first process that fails, after which the others are ended; else 0."""
    first_failure = 0
    running = set(children)
    while running:
        child, status = os.wait()
        running.discard(child)
        code = os.waitstatus_to_exitcode(status)
        if code and not first_failure:
            first_failure = code
            for other in running:
                os.kill(other, signal.SIGTERM)
    return first_failure


def serve():
    """Fork the processes of each request. Returns in them, with the request; not in the server."""
    print(json.dumps(READY), flush=True)
    while True:
        line = sys.stdin.readline()
        if not line:
            sys.exit()  # the tests are over
        request = json.loads(line)
        children = []
        for extra in rank_environments(request["ranks"]):
            child = os.fork()
            if child == 0:
                request["environment"].update(extra)
                return request
            children.append(child)
        print(json.dumps(wait_for(children)), flush=True)


if __name__ == "__main__":
    import_torch()
    request = serve()
    redirect(request)
    run_as_main(request["command"])
