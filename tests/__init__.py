"""Tests mirror the package: tests/model/test_shard.py tests splitllm/model/shard.py."""
