# Print pip constraints for torch, for the packages that are compiled against it, and for those that it runs on.
pip list --format=freeze |
    grep -iE '^(torch|pytorch-triton|triton|transformer[-_]engine|flash[-_]attn|apex|nvidia|cuda)[^=]*=='
