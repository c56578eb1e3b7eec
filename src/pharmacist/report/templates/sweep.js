// The page of a sweep has charts and plain tables.
"use strict";
pharmacist.start(() => {});
