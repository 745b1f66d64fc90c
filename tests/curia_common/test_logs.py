import logging

from curia_common import logs


def test_log_line_is_the_message_alone_on_standard_error(capsys) -> None:
    logs.configure()
    logs.configure()  # a second call adds no second handler
    logs.get_logger("data_pipeline.stages.commit").info("%d shards in %s", 3, "[folder]")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "3 shards in [folder]\n")


def test_other_hosts_log_warnings_alone(capsys) -> None:
    logs.configure(logging.WARNING)
    logger = logs.get_logger("curia_jax.training")
    logger.info("step 1")
    logger.warning("slow input")
    logs.configure()
    assert capsys.readouterr().err == "slow input\n"
