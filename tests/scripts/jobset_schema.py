"""Make `jobset_schema.json`: the published schema of JobSet, without descriptions and what launch files do not use.

    python tests/scripts/jobset_schema.py CRD.yaml COMMIT > tests/scripts/jobset_schema.json

CRD.yaml is config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset (Apache-2.0).
JobSet's own fields are all in it; of those of a pod that scripts/launch/jobset.yaml does not have, only the names.
"""

import json
import sys
from pathlib import Path

import yaml

LAUNCH = Path(__file__).parents[2] / "scripts" / "launch" / "jobset.yaml"
CHECKED = ("type", "required", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "maxItems")
CHECKED += ("x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields")


def reduced(schema, values, pod=False):
    """The schema with the parts that some values have; inside a pod's, names alone for the rest."""
    found = {key: schema[key] for key in CHECKED if key in schema}
    if "properties" in schema:
        found["properties"] = {}
        for name, one in schema["properties"].items():
            inside = [value[name] for value in values if isinstance(value, dict) and name in value]
            pod_here = pod or name == "template"
            found["properties"][name] = reduced(one, inside, pod_here) if inside or not pod_here else {}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            inside = [part for value in values for part in (value if key == "items" else value.values())]
            found[key] = reduced(schema[key], inside, pod)
    return found


if __name__ == "__main__":
    crd = yaml.safe_load(Path(sys.argv[1]).read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    source = {
        "source": "github.com/kubernetes-sigs/jobset, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml",
        "commit": sys.argv[2],
        "license": "Apache-2.0, Copyright The Kubernetes Authors",
        "reduced": "by tests/scripts/jobset_schema.py: descriptions are gone, and fields of pods not used here",
        "group": crd["spec"]["group"],
        "version": crd["spec"]["versions"][0]["name"],
        "kind": crd["spec"]["names"]["kind"],
    }
    print(json.dumps(source | {"schema": reduced(schema, [yaml.safe_load(LAUNCH.read_text())])}, indent=1))
