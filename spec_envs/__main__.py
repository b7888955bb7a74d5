"""``python -m spec_envs`` is the command ``spec-envs``."""

from spec_envs.cli import main

if __name__ == "__main__":
    main()
