# Print, as pip constraints, torch and the installed packages that are compiled against it or that it runs on.
pip list --format=freeze |
    grep -iE '^(torch|pytorch-triton|triton|transformer[-_]engine|flash[-_]attn|apex|nvidia|cuda)[^=]*=='
