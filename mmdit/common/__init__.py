"""What every package here may use: errors, how options are declared, files written whole. It imports none of them.

Nothing in it needs PyTorch, so that the command lines answer `--help` and mistakes at once.
"""
