"""Everything that knows Ray: one file a stage, each around pure functions of `screening`."""
