"""`fieldtune page`."""

from __future__ import annotations

from fieldtune.commands.common import Config, Set, warn
from fieldtune.deployment import load_deployment
from runtime.supervisor import stop_on_signals


def page(config: Config, /, *, overrides: Set = ()) -> int:
    """Serve the operator's page of a run: robots, versions, learning, episodes. `fieldtune up` does it by itself.

    It reads the run's files and asks its runtime, so it may be started and stopped at any time, on the same computer.

    Examples:
      fieldtune page my_arm.yaml
      fieldtune page my_arm.yaml --set page.port=9000
    """
    deployment = load_deployment(config, overrides)
    from fieldtune.page.app import serve
    from fieldtune.page.config import check_page_config
    from fieldtune.page.view import RunView

    check_page_config(deployment.page)
    stop = stop_on_signals()
    serve(RunView(deployment), deployment.page, stop.is_set, warn)
    return 0
