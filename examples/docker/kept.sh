# Prints, as pip constraints, torch and the packages here that are compiled against it or make it compute.
pip list --format=freeze |
    grep -iE '^(torch|pytorch-triton|triton|transformer[-_]engine|flash[-_]attn|apex|nvidia|cuda)[^=]*=='
