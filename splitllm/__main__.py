"""`python -m splitllm`, and so `accelerate launch -m splitllm`."""

from splitllm.cli import main

if __name__ == "__main__":
    main()
