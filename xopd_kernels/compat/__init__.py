"""The operators behind the names, signatures and results of other projects.

Change the import and nothing else: `xopd_kernels.compat.torch_nn` for torch.nn.functional,
`.trl` for TRL, `.verl` for verl, `.liger` for Liger-Kernel. No module imports its peer or replaces
anything in it. An argument whose effect is not supported raises NotImplementedError and says what
to do instead; tuning knobs of the peer (chunk sizes, `compiled`) change no result there and are
accepted without effect here. Long argument lists are the peers'.
"""
