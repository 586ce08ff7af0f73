"""Stubs for tests, made by the real plugins of grpclib, grpcio and betterproto2 as the tests begin.

They land in a package ``meshprotos`` in a folder of its own: ``meshprotos.interop_pb2`` (messages),
``meshprotos.interop_grpc`` (grpclib), ``meshprotos.interop_pb2_grpc`` (grpcio); betterproto2's in another one,
``meshprotos_better``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

HERE = Path(__file__).parent / "protos"


def generate(folder: Path) -> Path:
    """Make them all below ``folder``, which is to go onto ``sys.path``."""
    package = folder / "meshprotos"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").touch()
    names = []
    for proto in sorted(HERE.glob("*.proto")):
        shutil.copy(proto, package / proto.name)
        names.append(f"meshprotos/{proto.name}")
    wellknown = str(resources.files("grpc_tools") / "_proto")
    compiler = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"-I{wellknown}"]
    # The plugins are programs beside the interpreter, which need not be on the path.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    outputs = ["--python_out=.", "--grpclib_python_out=.", "--grpc_python_out=."]
    subprocess.run([*compiler, *outputs, *names], cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def generate_better(folder: Path) -> Path:
    """Make betterproto2's below ``folder``."""
    package = folder / "meshprotos_better"
    package.mkdir(parents=True, exist_ok=True)
    compiler = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--python_betterproto2_out={package}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    options = ["--python_betterproto2_opt=client_generation=async", "--python_betterproto2_opt=server_generation=async"]
    subprocess.run([*compiler, *options, "interop.proto"], env=environment, check=True, capture_output=True)
    return folder
