"""`python -m d2c_mlx`: the command `d2c-mlx`."""

__all__: list[str] = []

if __name__ == "__main__":
    # The package that the command line is installed as; the library imports it nowhere else.
    from d2c_mlx_cli.main import main

    main()
