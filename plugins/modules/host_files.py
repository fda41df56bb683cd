#!/usr/bin/python
"""Module host_files: many small files and directories of a host in one call, all of them valid or none written."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_files
short_description: Write many small files and directories in one call
description:
  - What takes two calls for each file otherwise. Directories are made and files written in the order given; a file is replaced
    at one stroke.
  - Every changed file that has O(files[].validate) is checked before anything is written. If one is refused, nothing changes.
  - Content is not secret. It is shown with C(--diff), and in the arguments of the module.
options:
  files:
    description: The files and directories.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description: Absolute path. The directory that it lies in is there, or comes before it in O(files).
        type: path
        required: true
      state:
        description: Whether it is a file or a directory.
        type: str
        choices: [file, directory]
        default: file
      content:
        description: The whole content of a file.
        type: str
      initial:
        description: Whether a file that exists keeps the content it has.
        type: bool
        default: false
      owner:
        description: Name of the owner.
        type: str
        default: root
      group:
        description: Name of the group.
        type: str
        default: root
      mode:
        description: Mode in octal digits; C(0644) for files and C(0755) for directories where it is not given.
        type: str
      validate:
        description: Command that refuses a wrong file; C(%s) in it stands for a path with the new content.
        type: str
author: Atlas
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Settings of sshd, and a directory
  host_files:
    files:
      - path: /etc/ssh/sshd_config.d/10-atlas.conf
        content: "{{ lookup('ansible.builtin.template', 'sshd.conf.j2') }}"
        mode: "0600"
        validate: /usr/sbin/sshd -t -f %s
      - {path: /etc/atlas, state: directory}
"""

RETURN = r"""
written:
  description: Paths whose content, owner, group or mode changed, or would change.
  type: list
  elements: str
  returned: success
"""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule

VALIDATE_SECONDS = 60
MODES = {"file": "0644", "directory": "0755"}


class FilesError(Exception):
    """What is wrong with a file, in words for the user."""


def content_of(path: str) -> str | None:
    """Return what the file *path* holds, None where there is none; raise FilesError for anything but a text file."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise FilesError(f"{path} is no text file: it was not replaced. Take it away, if it may go") from None


def validate(path: str, content: str, command: str) -> None:
    """Raise FilesError with what *command* says where it refuses *content* for *path*."""
    if "%s" not in command:
        raise FilesError(f"{path}: validate has to name the file as %s: {command}")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="atlas-", suffix=os.path.basename(path)) as stream:
        stream.write(content)
        stream.flush()
        argv = [word.replace("%s", stream.name) for word in shlex.split(command)]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=VALIDATE_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FilesError(f"{path} cannot be checked: {error}. Nothing was changed") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().replace(stream.name, path)
        raise FilesError(f"{path} would be wrong, so nothing was changed: {argv[0]} says: {said}")


def write(module: AnsibleModule, path: str, content: str) -> None:
    """Replace *path* at one stroke; it keeps owner and mode."""
    handle, partial = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")
    module.add_cleanup_file(partial)
    with os.fdopen(handle, "w", encoding="utf-8") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    module.atomic_move(partial, path)


class Entry:
    """One file or directory: what it is, what it has to be, and how to get there."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self.path: str = wanted["path"]
        self.wanted = wanted
        self.mode: str = wanted["mode"] or MODES[wanted["state"]]
        self.is_directory = wanted["state"] == "directory"
        self.exists = os.path.lexists(self.path)
        if not self.is_directory and wanted["content"] is None:
            raise FilesError(f"{self.path} is a file without content")
        if self.exists and os.path.isdir(self.path) != self.is_directory:
            raise FilesError(f"{self.path} is not a {wanted['state']}: it was not replaced. Take it away, if it may go")
        self.before = None if self.is_directory else content_of(self.path)
        keeps = self.is_directory or (wanted["initial"] and self.exists)
        self.after = self.before if keeps else str(wanted["content"])

    @property
    def differs(self) -> bool:
        """Whether it has to be made or written."""
        return not self.exists or self.before != self.after

    def validate(self) -> None:
        """Have a new content checked where there is a command for that."""
        if self.differs and self.after is not None and self.wanted["validate"]:
            validate(self.path, self.after, self.wanted["validate"])

    def bring_about(self, module: AnsibleModule) -> tuple[bool, dict[str, str]]:
        """Make or write it, then owner, group and mode; tell whether anything changed, and the difference."""
        changed = self.differs
        diff = {
            "before_header": self.path, "after_header": self.path, "before": self.before or "", "after": self.after or "",
        }  # fmt: skip
        if self.is_directory and changed:
            diff |= {"before": "", "after": "directory\n"}
        if changed and not module.check_mode:
            if self.is_directory:
                os.mkdir(self.path, 0o700)
            else:
                write(module, self.path, str(self.after))
        if not os.path.lexists(self.path):
            return changed, diff
        attributes: dict[str, Any] = {
            "path": self.path, "owner": self.wanted["owner"], "group": self.wanted["group"], "mode": self.mode,
            "secontext": [None, None, None], "attributes": None,
        }  # fmt: skip
        moved: dict[str, Any] = {}
        if module.set_fs_attributes_if_different(attributes, False, diff=moved):
            if not changed:
                diff |= {side: _lines(moved.get(side, {})) for side in ("before", "after")}
            changed = True
        return changed, diff


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{name}: {value}\n" for name, value in sorted(values.items()) if name != "path")


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "path", "required": True},
                    "state": {"type": "str", "choices": ["file", "directory"], "default": "file"},
                    "content": {"type": "str"},
                    "initial": {"type": "bool", "default": False},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str"},
                    "validate": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    try:
        entries = [Entry(wanted) for wanted in module.params["files"]]
        for entry in entries:
            entry.validate()
        done = [(entry.path, *entry.bring_about(module)) for entry in entries]
    except FilesError as error:
        module.fail_json(msg=f"{error}.")
    except OSError as error:
        module.fail_json(msg=f"{error.filename or 'file system'}: {error.strerror or error}")
    written = [path for path, changed, _ in done if changed]
    module.exit_json(changed=bool(written), written=written, diff=[diff for _, changed, diff in done if changed])


if __name__ == "__main__":
    main()
