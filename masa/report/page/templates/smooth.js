"use strict";

/**
 * Exponential mean of a curve; 0 leaves it as it is. Corrected for its start, so that the first values count in full.
 * @param {number[]} values
 * @param {number} weight of the past, below 1
 * @returns {number[]}
 */
function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    sum = weight * sum + value;
    total = weight * total + 1;
    return sum / total;
  });
}
