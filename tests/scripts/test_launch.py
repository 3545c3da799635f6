"""Launch files: shells can read them, and they say what the program understands."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tessera.cli.main import HOSTS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "scripts" / "launch").iterdir())


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix != ".yaml"], ids=lambda path: path.name)
def test_a_shell_can_read_it(path):
    run = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30)
    assert run.returncode == 0 and not run.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_flags_and_variables_are_those_of_the_program(path):
    text = path.read_text()
    command = text.partition("train.py")[2]
    flags = set(re.findall(r"--(\w+_seconds|coordinator|process\w*)\b", command))
    assert flags and flags <= {flag.name for flag in HOSTS}
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists()


SCHEMA = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
JOBSET = yaml.safe_load((ROOT / "scripts" / "launch" / "jobset.yaml").read_text())
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def wrong(value, schema, place=""):
    """What a Kubernetes server with strict validation would refuse of a value, by the rules of its schema."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) and not isinstance(value, bool) else [f"{place}: no number or string"]
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return [f"{place}: {value!r} is no {kind}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{place}: {value!r} is none of {schema['enum']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{place}: {value!r} does not match {schema['pattern']}")
    number = isinstance(value, int | float)
    if number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{place}: {value} is out of range")
    if isinstance(value, list):
        if len(value) > schema.get("maxItems", len(value)):
            found.append(f"{place}: more than {schema['maxItems']}")
        found += [text for i, one in enumerate(value) for text in wrong(one, schema.get("items", {}), f"{place}[{i}]")]
    if isinstance(value, dict):
        found += [f"{place}.{name} is missing" for name in schema.get("required", []) if name not in value]
        for name, one in value.items():
            inside = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            # The server knows what stands in metadata by itself: the schema says "object".
            if inside is None and "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
                found.append(f"{place}.{name}: no such field")
            found += wrong(one, inside or {}, f"{place}.{name}")
    return found


def test_the_jobset_is_valid_by_its_published_schema():
    assert JOBSET["apiVersion"] == f"{SCHEMA['group']}/{SCHEMA['version']}" and JOBSET["kind"] == SCHEMA["kind"]
    assert wrong(JOBSET, SCHEMA["schema"]) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.replicatedJobs.0.replicas", "one", "is no integer"),
        ("spec.replicatedJob", [], "no such field"),
        ("spec.failurePolicy.maxRestart", 1, "no such field"),
        ("spec.failurePolicy.restartStrategy", "Never", "is none of"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.port", [], "no such field"),
        ("spec.replicatedJobs.0.template.spec.template.spec.containers.0.name", None, "is no string"),
        ("spec.replicatedJobs.0.template.spec.template.spec.restartPolicy", 5, "is no string"),
    ],
)
def test_what_is_wrong_in_a_jobset_is_found(path, value, message):
    changed = json.loads(json.dumps(JOBSET))
    *parents, last = path.split(".")
    place = changed
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    assert message in " ".join(wrong(changed, SCHEMA["schema"]))


def test_the_coordinator_is_the_first_pod():
    """A pod's name is JOBSET-JOB-0-INDEX, its domain the subdomain, by default the JobSet's name."""
    name, (job,) = JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    port = container["ports"][0]["containerPort"]
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:{port}" in container["args"]
    assert pods["template"]["spec"]["subdomain"] == name and JOBSET["spec"]["network"]["enableDNSHostnames"]
    assert f"--processes={pods['completions']}" in container["args"] and pods["parallelism"] == pods["completions"]
    volumes = {one["name"] for one in pods["template"]["spec"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
