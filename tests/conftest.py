"""Settings of every test: long trials only on request, and no warnings that nobody here can act on."""


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: many trials of one fault; run with -m soak")
    for noise in ("ignore::FutureWarning:torch", "ignore::FutureWarning:megatron", "ignore::DeprecationWarning:megatron",
                  "ignore::FutureWarning:megatron_ext", "ignore::UserWarning:megatron_ext"):
        config.addinivalue_line("filterwarnings", noise)
    if not config.option.markexpr:
        config.option.markexpr = "not soak"
