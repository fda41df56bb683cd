#!/usr/bin/python
"""Module backup_program: installs the program of backups on a host, from the very code that playbooks use."""

from __future__ import annotations

DOCUMENTATION = r"""
module: backup_program
short_description: Install the backup program on a host
description:
  - Timers run without Ansible, so the host keeps the part of C(plugins/module_utils) that backups need, with a launcher.
options:
  part:
    description:
      - V(agent) is what every host with something to save has (C(/usr/local/sbin/atlas-backup-agent)).
      - V(host) is what the backup host has (C(ROOT/atlas-backup)).
    type: str
    choices: [agent, host]
    required: true
  root:
    description: Directory of the program.
    type: path
    default: /usr/local/lib/atlas
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Install the agent
  backup_program:
    part: agent
"""

RETURN = r"""
files:
  description: The files that were written, or would be.
  type: list
  returned: always
"""

import ast
import importlib
from pathlib import Path

from ansible.module_utils import backup_agent, backup_host
from ansible.module_utils.atlas_host import write_atomically
from ansible.module_utils.basic import AnsibleModule

PACKAGE = "ansible.module_utils"
PARTS = {"agent": backup_agent.__name__, "host": backup_host.__name__}
LAUNCHER = """\
#!/usr/bin/python3 -IB
# Managed by Ansible: part of the backups of Atlas (role backup).
import sys

sys.path.insert(0, "{root}")

from {module} import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def source(name: str) -> str:
    """Return the text of the module *name*, also from the archive that Ansible runs modules from."""
    text = importlib.import_module(name).__loader__.get_source(name)  # type: ignore[union-attr]
    return str(text)


def needed(name: str) -> dict[str, str]:
    """Return name → text of the module *name* and of all of ours that it imports."""
    found: dict[str, str] = {}
    wanted = [name]
    while wanted:
        current = wanted.pop()
        if current in found:
            continue
        found[current] = source(current)
        for node in ast.walk(ast.parse(found[current])):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
                wanted += [f"{PACKAGE}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                wanted.append(str(node.module))
    return found


def wanted_files(part: str, root: Path) -> dict[Path, tuple[str, int]]:
    """Return path → (text, mode) of all files of *part* under *root*."""
    files: dict[Path, tuple[str, int]] = {}
    for package in PACKAGE.split("."):
        top = root / PACKAGE.split(package)[0].replace(".", "/") / package
        files[top / "__init__.py"] = ("", 0o644)
    for name, text in needed(PARTS[part]).items():
        files[root / f"{name.replace('.', '/')}.py"] = (text, 0o644)
    launcher = Path("/usr/local/sbin/atlas-backup-agent") if part == "agent" else root / "atlas-backup"
    files[launcher] = (LAUNCHER.format(root=root, module=PARTS[part]), 0o755)
    return files


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "part": {"type": "str", "choices": ["agent", "host"], "required": True},
            "root": {"type": "path", "default": "/usr/local/lib/atlas"},
        },
        supports_check_mode=True,
    )
    changed = []
    for path, (text, mode) in wanted_files(module.params["part"], Path(module.params["root"])).items():
        try:
            same = path.read_text() == text and path.stat().st_mode & 0o777 == mode
        except OSError:
            same = False
        if same:
            continue
        changed.append(str(path))
        if not module.check_mode:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_atomically(path, text, mode)
    lines = "".join(f"{name}\n" for name in changed)
    module.exit_json(changed=bool(changed), files=changed, diff=[{"before": "", "after": lines}])


if __name__ == "__main__":
    main()
