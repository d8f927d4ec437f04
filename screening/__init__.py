"""The science of a phenotypic screen: arrays and tables in, arrays and tables out."""
