"""Lets tests import the project's Ansible code the way Ansible does: as ``ansible.module_utils.NAME``."""

from __future__ import annotations

import sys
from pathlib import Path

import ansible.module_utils

PROJECT = Path(__file__).resolve().parent.parent
ansible.module_utils.__path__.append(str(PROJECT / "plugins" / "module_utils"))
for folder in (".", "plugins/modules", "plugins/inventory", "plugins/filter", "plugins/callback", "bin", "molecule"):
    sys.path.insert(0, str(PROJECT / folder))
