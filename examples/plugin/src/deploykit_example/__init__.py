"""An example of what another distribution can add to DeployKit; each module holds one step, found by entry points."""
