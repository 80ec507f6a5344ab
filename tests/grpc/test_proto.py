"""The .proto files: buf's STANDARD rules, a comment on everything, and stubs that are those of the files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from forerun.v1 import admin_service_pb2, generation_service_pb2, model_service_pb2, trace_service_pb2
from google.protobuf import descriptor_pb2

PROTO = Path(__file__).parents[2] / "proto"
MODULES = (admin_service_pb2, generation_service_pb2, model_service_pb2, trace_service_pb2)
FILES = sorted(path.relative_to(PROTO) for path in PROTO.rglob("*.proto"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    kinds = [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO), *kinds, "--include_source_info"]
    subprocess.run([*command, f"--descriptor_set_out={out}/all.bin", *map(str, FILES)], check=True)
    return out


def test_stubs_are_those_of_the_files(made: Path) -> None:
    stubs = sorted(path.relative_to(made) for path in made.rglob("*.py*"))
    assert len(stubs) == 3 * len(FILES)
    for stub in stubs:
        assert (made / stub).read_text() == (PROTO / stub).read_text(), f"python -m grpc_tools.protoc must be run again for {stub}"


def test_everything_has_a_comment(made: Path) -> None:
    files = descriptor_pb2.FileDescriptorSet.FromString((made / "all.bin").read_bytes())
    assert {file.name for file in files.file} == {str(path) for path in FILES}
    for file in files.file:
        commented = {tuple(each.path) for each in file.source_code_info.location if each.leading_comments.strip()}
        wanted: list[tuple[tuple[int, ...], str]] = []
        for i, message in enumerate(file.message_type):
            wanted.append(((4, i), message.name))
            wanted += [((4, i, 2, j), f"{message.name}.{field.name}") for j, field in enumerate(message.field)]
        for i, enum in enumerate(file.enum_type):
            wanted.append(((5, i), enum.name))
            wanted += [((5, i, 2, j), value.name) for j, value in enumerate(enum.value)]
        for i, service in enumerate(file.service):
            wanted.append(((6, i), service.name))
            wanted += [((6, i, 2, j), method.name) for j, method in enumerate(service.method)]
        assert [name for path, name in wanted if path not in commented] == []


@pytest.mark.parametrize("module", MODULES)
def test_names_are_as_buf_has_them(module: object) -> None:
    """https://buf.build/docs/lint/rules: the category STANDARD, as far as these files can break it."""
    file = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(file)  # type: ignore[attr-defined]
    assert file.syntax == "proto3"
    assert file.package == "forerun.v1"
    assert re.fullmatch(r"forerun/v1/[a-z0-9_]+\.proto", file.name)
    for enum in file.enum_type:
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
        assert re.fullmatch("[A-Z][A-Za-z0-9]+", enum.name)
        assert all(re.fullmatch(f"{prefix}[A-Z0-9_]+", value.name) for value in enum.value)
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}UNSPECIFIED", 0)
        assert not enum.options.allow_alias
    for message in file.message_type:
        assert re.fullmatch("[A-Z][A-Za-z0-9]+", message.name)
        for field in message.field:
            assert re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", field.name)
        assert not any(name in message.name for name in ("Enum", "_"))
    used: list[str] = []
    for service in file.service:
        assert re.fullmatch("[A-Z][A-Za-z0-9]+Service", service.name)
        for method in service.method:
            assert method.input_type == f".forerun.v1.{method.name}Request"
            assert method.output_type == f".forerun.v1.{method.name}Response"
            used += [method.input_type, method.output_type]
    assert len(used) == len(set(used))
