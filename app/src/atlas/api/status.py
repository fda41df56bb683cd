"""The status page at `/`: rendered here, readable without JavaScript, free of secrets."""

from __future__ import annotations

from flask import Blueprint, render_template

from atlas.api.health import detail
from atlas.api.state import state

blueprint = Blueprint("status", __name__, template_folder="templates")


@blueprint.get("/")
def page() -> str:
    return render_template("status.html", health=detail(state()))
