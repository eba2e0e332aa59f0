"`python -m ltbook`, the same as the command `ltbook`."

if __name__ == "__main__":
    from ltbook.cli.main import main
    main()
