"""`python -m kd_trainer COMMAND` is the console command, where that is not on the path."""

from kd_trainer.commands.main import main

if __name__ == "__main__":
    main()
